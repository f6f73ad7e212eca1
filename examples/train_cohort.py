"""Train clients of different ranks together, save their adapters for PEFT, and add their exact sum to the model."""

import tempfile
from pathlib import Path

import tiny

import flora_core as flora

model = tiny.model()
clients = [
    flora.ClientSpec("clinic-a", tiny.examples(16, seed=3), flora.AdapterConfig(rank=8, alpha=16)),
    flora.ClientSpec("clinic-b", tiny.examples(8, seed=50), flora.AdapterConfig(rank=2, alpha=4, dropout=0.1)),
    flora.ClientSpec("clinic-c", tiny.examples(4, seed=90), flora.AdapterConfig(rank=4, alpha=8), {"lr": 3e-3}),
]
cohort = flora.attach(model, clients, target_modules=["q_proj", "v_proj"])
print(flora.explain(model))

updates = flora.CohortTrainer(cohort, flora.TrainConfig(lr=1e-2, local_epochs=3)).run()
flora.detach(model)

result = flora.aggregate(updates, strategy="flora")
for module, (A_PK, B_PN, coef_P) in result.base_delta.items():
    flora.stacked_merge_(model.get_submodule(module).weight.detach(), A_PK, B_PN, coef_P, accumulate="float64")
print(f"aggregation error {result.certificate.aggregation_error:.1e}, {result.bytes_up} bytes up")

with tempfile.TemporaryDirectory() as folder:
    for update in updates:
        flora.save_peft_adapter(update, Path(folder) / update.client)
        loss = update.metrics["loss_first"], update.metrics["loss_last"]
        print(f"{update.client}: rank {max(update.ranks.values())}, loss {loss[0]:.3f} -> {loss[1]:.3f}")
