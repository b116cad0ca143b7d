"""The grid of final ranks: what it says with colour, without, and in 80 columns."""

import io

import pytest
from rich.console import Console

from dynlora.report.rank_map import group_by_stack, shade_of
from dynlora.report.terminal import STYLES, rank_grid

BERT_KINDS = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]


def rendered(ranks, init_r, *, width=80, **options):
    out = io.StringIO()
    Console(file=out, width=width, **options).print(rank_grid(ranks, init_r=init_r, width=width))
    return out.getvalue()


def bert_ranks(layers):
    return {
        f"bert.encoder.layer.{i}.{kind}": (i + k) % 7
        for i in range(layers)
        for k, kind in enumerate(BERT_KINDS)
    }


def row(text, start):
    return next(line for line in text.splitlines() if line.startswith(start)).split()


def test_a_row_holds_the_ranks_of_its_layers_and_their_mean():
    text = rendered(bert_ranks(4), 6)
    assert row(text, "layer") == ["layer", "0", "1", "2", "3", "mean"]
    assert row(text, "attention.self.key") == ["attention.self.key", "1", "2", "3", "4", "2.50"]


def test_the_last_row_holds_column_means_and_the_mean_of_all():
    ranks = {"m.layers.0.q": 2, "m.layers.0.v": 5, "m.layers.1.q": 0, "m.layers.1.v": 3}
    assert row(rendered(ranks, 6), "mean") == ["mean", "3.5", "1.5", "2.50"]


def test_twelve_layers_of_bert_fit_80_columns_in_one_grid():
    text = rendered(bert_ranks(12), 6)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert text.count("attention.self.query") == 1


def test_layers_that_do_not_fit_go_on_below_with_the_same_row_mean():
    ranks = {f"model.layers.{i}.self_attn.q_proj": i for i in range(30)}
    text = rendered(ranks, 32)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    starts = [line.split() for line in text.splitlines() if line.startswith("self_attn.q_proj")]
    assert len(starts) > 1
    assert [int(cell) for cells in starts for cell in cells[1:-1]] == list(range(30))
    assert {cells[-1] for cells in starts} == {"14.50"}


def test_encoder_and_decoder_layers_do_not_collide():
    ranks = {"encoder.block.0.layer.0.q": 1, "decoder.block.0.layer.0.q": 4}
    stacks, others = group_by_stack(ranks)
    assert [s.name for s in stacks] == ["encoder.block", "decoder.block"]
    assert [s.rows for s in stacks] == [{"layer.0.q": {0: 1}}, {"layer.0.q": {0: 4}}]
    assert others == {}
    assert "encoder.block" in rendered(ranks, 6)


def test_modules_outside_any_layer_are_listed_below():
    text = rendered({"bert.encoder.layer.0.output.dense": 3, "bert.pooler.dense": 5}, 6)
    assert row(text, "  5") == ["5", "bert.pooler.dense"]


def test_a_layer_without_a_module_has_a_dash():
    text = rendered({"m.layers.0.q": 2, "m.layers.1.q": 3, "m.layers.1.v": 4}, 6)
    assert row(text, "v") == ["v", "-", "4", "4.00"]


def test_long_kinds_keep_their_end_unless_they_would_be_confused():
    tail = "SelfAttention.projection.query"
    text = rendered({f"m.layers.0.block.{tail}": 1}, 2)
    assert "…projection.query" in text
    twins = {f"m.layers.0.{first}_part.{tail}": rank for rank, first in enumerate("ab")}
    assert "a_part" in rendered(twins, 2, width=120)


def test_every_number_is_readable_without_colour():
    plain, coloured = (
        rendered(bert_ranks(3), 6, force_terminal=True, color_system=c) for c in (None, "truecolor")
    )
    assert "48;2;" in coloured
    assert "48;2;" not in plain
    assert row(plain, "output.dense")[1:4] == ["5", "6", "0"]


@pytest.mark.parametrize(("rank", "step"), [(0, 0), (1, 1), (3, 1), (4, 2), (12, 4), (40, 4)])
def test_shades_are_quarters_of_the_initial_rank(rank, step):
    assert shade_of(rank, 12) == step


def test_every_shade_sets_both_colours():
    assert all(style.color and style.bgcolor for style in STYLES)


def test_a_trailing_number_is_no_layer():
    assert group_by_stack({"features.0": 1}) == ([], {"features.0": 1})


def test_no_modules_give_a_legend_only():
    assert rendered({}, 4).split() == [
        *["rank", "0", "1", "2", "3", "4"],
        *["of", "4", "at", "the", "start"],
    ]
