"""Your own training loop: any optimizer, any loss; the cohort only routes each row to its client's adapter.

Rows of a batch belong to the clients in order: here two sequences of client a, then one of client b.
"""

import tiny
import torch
from torch.nn.functional import cross_entropy

import flora_core as flora

model = tiny.model()
clients = [
    flora.ClientSpec("a", adapter=flora.AdapterConfig(rank=8, alpha=16)),
    flora.ClientSpec("b", adapter=flora.AdapterConfig(rank=2, alpha=4)),
]
cohort = flora.attach(model, clients, target_modules=["q_proj", "v_proj"])
optimizer = torch.optim.AdamW(cohort.parameters(), lr=1e-2)

rows = {"a": tiny.examples(2, seed=3), "b": tiny.examples(1, seed=50)}
input_ids = torch.tensor([example.input_ids for client in cohort.names for example in rows[client]])
tokens = [input_ids.shape[1] * len(rows[client]) for client in cohort.names]

for step in range(20):
    with cohort.batch(tokens):
        logits = model(input_ids=input_ids).logits
        loss = cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none").mean(1)
        # One mean per client, so that no client's gradient depends on how much the others bring.
        client_loss = torch.stack([part.mean() for part in loss.split([len(rows[c]) for c in cohort.names])])
        client_loss.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step}: " + ", ".join(f"{c} {v:.3f}" for c, v in zip(cohort.names, client_loss.tolist())))

with cohort.use("b"), torch.no_grad():
    print("client b alone:", model.generate(input_ids[-1:, :4], max_new_tokens=4, do_sample=False).tolist())
