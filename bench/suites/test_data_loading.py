"""From records to batches: our encoding and packing against the tokenizer with transformers' padding collator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness.protocol import Check, Result, interleave
from flora_core.data.demo import make_demo
from flora_core.data.pack import epoch_order, pack
from flora_core.data.records import load_records
from flora_core.data.template import IGNORE, encode
from flora_core.runs.demo_model import demo_model_dir

CLIENTS, BATCH = 10, 4
FAIR = (
    "tokenizer + collator: the chat template and the tokenizer over all records at once, labels masked by the prompt's "
    "length as PEFT's examples do, DataCollatorForSeq2Seq (padding to the batch's longest, to a multiple of 8)"
)


class Loading:
    """Every client's records, and both ways of making an epoch's batches of them."""

    def __init__(self, per_client: int, folder: Path):
        from transformers import AutoTokenizer, DataCollatorForSeq2Seq

        self.tokenizer: Any = AutoTokenizer.from_pretrained(demo_model_dir())
        paths = make_demo(folder, clients=CLIENTS, train_per_client=per_client, test_items=0).clients.values()
        self.records = [load_records(path) for path in paths]
        self.collate = DataCollatorForSeq2Seq(self.tokenizer, pad_to_multiple_of=8, label_pad_token_id=IGNORE)

    def ours(self) -> list[Any]:
        """One epoch: all clients' examples of a step packed into one row."""
        examples = [encode(client, self.tokenizer, max_length=512) for client in self.records]
        orders = [epoch_order(len(client), 0, f"client-{c}", 0, 0) for c, client in enumerate(examples)]
        steps = range(0, max(map(len, orders)), BATCH)
        return [
            pack([[own[i] for i in order[at : at + BATCH]] for own, order in zip(examples, orders, strict=True)])
            for at in steps
        ]

    def theirs(self) -> list[Any]:
        """One epoch: a padded batch for every client and step."""
        batches = []
        for c, client in enumerate(self.records):
            rows = self.tokenized(client)
            order = epoch_order(len(rows), 0, f"client-{c}", 0, 0)
            batches += [self.collate([rows[i] for i in order[at : at + BATCH]]) for at in range(0, len(order), BATCH)]
        return batches

    def tokenized(self, records: list[Any]) -> list[dict[str, list[int]]]:
        """Whole conversations, labels on the answer alone."""
        chats = [_chat(record) for record in records]
        template: Any = self.tokenizer.apply_chat_template
        whole = self.tokenizer(template(chats, tokenize=False), add_special_tokens=False).input_ids
        prompts = template([chat[:-1] for chat in chats], tokenize=False, add_generation_prompt=True)
        cut = [len(ids) for ids in self.tokenizer(prompts, add_special_tokens=False).input_ids]
        return [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORE] * at + ids[at:]}
            for ids, at in zip(whole, cut, strict=True)
        ]

    def check(self) -> Check:
        """Every record's answer tokens are the collator's, but for what its template writes after the end mark."""
        wrong = 0
        for client in self.records:
            for mine, row in zip(encode(client, self.tokenizer, max_length=512), self.tokenized(client), strict=True):
                answer = [label for label in mine.labels if label != IGNORE]
                theirs = [label for label in row["labels"] if label != IGNORE]
                wrong += theirs[: len(answer)] != answer or row["input_ids"][: len(mine.input_ids)] != mine.input_ids
        packed = self.ours()
        targets = sum(int((batch.labels != IGNORE).sum()) for batch in packed)
        expected = sum(
            label != IGNORE
            for client in self.records
            for e in encode(client, self.tokenizer, max_length=512)
            for label in e.labels[1:]
        )
        wrong += targets != expected
        return Check(
            float("inf") if wrong else 0.0, f"ids and labels of {sum(map(len, self.records))} records, exactly"
        )


def _chat(record: Any) -> list[dict[str, str]]:
    texts = zip(("system", "user", "assistant"), ("system", "instruction", "output"), strict=True)
    return [{"role": role, "content": record[name]} for role, name in texts]


def test_bench_data_loading(benchmark: Any, scale: Any, tmp_path: Path):
    per_client = 60 if scale.full else 4
    try:
        setting = Loading(per_client, tmp_path / "demo")
    except (OSError, ValueError, ImportError) as error:
        pytest.skip(f"needs the demo's tokenizer: {error}")
    result = Result(
        "data_loading",
        f"An epoch's batches of {CLIENTS} clients, {per_client} records each, batch {BATCH}: from records to tensors",
        {"clients": CLIENTS, "records": per_client, "batch_size": BATCH, "fair": FAIR},
        scale.folder,
    )
    with result.reported():
        values = interleave(
            benchmark,
            result,
            ("flora", setting.ours),
            {"tokenizer + collator": setting.theirs},
            check=lambda _: setting.check(),
            seconds=6 * scale.seconds,
            most=15,
        )
        real = sum(batch.input_ids.numel() for batch in values["flora"][-1])
        padded = sum(batch["input_ids"].numel() for batch in values["tokenizer + collator"][-1])
        result.save(tokens=real, padded_over_real=padded / real, threads=torch.get_num_threads())
        print("\n" + result.conclude("flora", {"tokenizer + collator": None}))
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}
