"""Hugging Face's Trainer: a MuonClip, and a callback that logs (python examples/hugging_face_trainer.py)."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lightning_muonclip import MuonClip
from lightning_muonclip.hugging_face import MuonClipLogger


def main(folder: str = "outputs/hugging_face_trainer", max_steps: int = 100, **options: object) -> Trainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    rows = (torch.arange(2048)[:, None] * torch.arange(1, 25) + torch.arange(2048)[:, None]) % 31  # progressions
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(
        folder, max_steps=max_steps, per_device_train_batch_size=16, logging_steps=10, report_to="none"
    )
    optimizer = MuonClip(model, lr=3e-3)
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[MuonClipLogger()])
    trainer.train(**options)
    return trainer


if __name__ == "__main__":
    print(main().state.log_history[-2])
