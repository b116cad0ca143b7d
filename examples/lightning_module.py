"""Lightning: the module builds the allocator with its optimizer, and checkpoints its progress.

python examples/lightning_module.py --model FacebookAI/roberta-base --data SetFit/sst2
"""

import argparse

import lightning
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from dynlora import RankAllocator
from dynlora.lora.follow import AdapterStart, CheckpointFollower


class Classifier(lightning.LightningModule):
    """A sequence classifier with a LoRA."""

    def __init__(self, name: str) -> None:
        super().__init__()
        base = AutoModelForSequenceClassification.from_pretrained(name)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
        self.model, self.start, self.progress = get_peft_model(base, config), None, None

    def configure_optimizers(self):  # noqa: ANN201, D102
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)
        plan = {"total_steps": int(self.trainer.estimated_stepping_batches), "target_r": 4}
        self.allocator = RankAllocator(self.model, optimizer, start=self.start, **plan)
        if self.progress:
            self.allocator.load_state_dict(self.progress)
        return optimizer

    def training_step(self, batch):  # noqa: ANN001, ANN201, D102
        return self.model(**batch).loss

    def on_save_checkpoint(self, checkpoint: dict) -> None:  # noqa: D102
        checkpoint["dynlora"] = self.allocator.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:  # noqa: D102
        self.start, self.progress = AdapterStart.of(self.model), checkpoint["dynlora"]
        CheckpointFollower(self.model, self.start)  # weights come next, of other ranks perhaps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="FacebookAI/roberta-base")
    parser.add_argument("--data", default="SetFit/sst2", help="hub id, or a folder of files")
    parser.add_argument("--output", default="out")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = load_dataset(options.data, split="train").rename_column("label", "labels")
    data = data.map(lambda r: tokenizer(r["text"])).select_columns(["input_ids", "labels"])
    loader = torch.utils.data.DataLoader(data, 16, collate_fn=DataCollatorWithPadding(tokenizer))
    module = Classifier(options.model)
    lightning.Trainer(max_steps=options.steps, default_root_dir="runs").fit(module, loader)
    module.allocator.finalize_()
    module.model.save_pretrained(options.output)
