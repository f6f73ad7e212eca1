"""A cohort under transformers.Trainer: its loop, logging and schedules, our routing.

Every training item is one step of the whole cohort: the rows of client a, then those of client b.
"""

import tempfile

import tiny
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import flora_core as flora

ROWS = {"a": 2, "b": 1}  # sequences of each client per step

model = tiny.model()
clients = [
    flora.ClientSpec("a", adapter=flora.AdapterConfig(rank=8, alpha=16)),
    flora.ClientSpec("b", adapter=flora.AdapterConfig(rank=2, alpha=4)),
]
cohort = flora.attach(model, clients, target_modules=["q_proj", "v_proj"])
steps = [
    {"input_ids": [ex.input_ids for name, seed in (("a", 3), ("b", 50)) for ex in tiny.examples(ROWS[name], seed + i)]}
    for i in range(10)
]


class CohortHFTrainer(Trainer):
    """One forward pass for the whole cohort; the loss is the sum of the clients' means."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        input_ids = inputs["input_ids"]
        with cohort.batch([input_ids.shape[1] * count for count in ROWS.values()]):
            outputs = model(input_ids=input_ids)
        loss = cross_entropy(outputs.logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none").mean(1)
        loss = torch.stack([part.mean() for part in loss.split(list(ROWS.values()))]).sum()
        return (loss, outputs) if return_outputs else loss


with tempfile.TemporaryDirectory() as folder:
    trainer = CohortHFTrainer(
        model=model,
        args=TrainingArguments(
            folder,
            per_device_train_batch_size=1,
            num_train_epochs=2,
            logging_steps=5,
            report_to="none",
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        ),
        train_dataset=steps,  # pyright: ignore[reportArgumentType]
        data_collator=lambda items: {"input_ids": torch.tensor(items[0]["input_ids"])},
        optimizers=(torch.optim.AdamW(cohort.parameters(), lr=1e-2), None),
    )
    trainer.train()

updates = [cohort.update(name, examples=10 * ROWS[name]) for name in cohort.names]
result = flora.aggregate(updates)
print(f"{len(result.base_delta)} modules, aggregation error {result.certificate.aggregation_error:.1e}")
