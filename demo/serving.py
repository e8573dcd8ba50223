# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sync into a live engine, on whichever vLLM is installed, and compare its answers.

    python -m demo.serving SERVICE FOLDER       # prints two measurements

SERVICE is a key of `SERVICES`, FOLDER is where the checkpoints are written.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from demo.measurement import Measurement, Outcome, describe
from demo.trainer import BUCKET_BYTES, Trainer
from tests.checkpoints import CASES, write_checkpoint

SEED_A, SEED_B = 1, 2
PROMPTS = ["The weights of a model", "A scale is", "0 1 2 3", "Once upon a time"]
NEW_TOKENS = 12
LOGPROBS = 5


@dataclass(frozen=True)
class Service:
    """A checkpoint that a live engine serves while a trainer syncs into it.

    Attributes:
        checkpoint: A name in `tests.checkpoints.CASES`.
        synced: Title of the case in which the trainer syncs.
        died: Title of the case in which it dies half way.
        cloned: Whether the workers clone each chunk.
    """

    checkpoint: str
    synced: str
    died: str
    cloned: bool = False


SERVICES = dict(
    fp8=Service(
        "qwen3_moe-fp8_block",
        "live engine, FP8 blocks: sync through one reused bucket",
        "live engine, FP8 blocks: the trainer dies half way",
    ),
    bf16=Service(
        "qwen3_moe-bf16",
        "live engine, bf16 experts: sync, each chunk cloned",
        "live engine, bf16 experts: the trainer dies half way",
        cloned=True,
    ),
)


class CannotServe(RuntimeError):
    """This vLLM cannot serve such a checkpoint on this machine."""


class Served(NamedTuple):
    """What an engine answers, and what its model holds.

    Attributes:
        answers: For each prompt its tokens, and for each token the log-probabilities
            of the likeliest ones.
        digests: By path, of everything that the model serves with.
    """

    answers: list[tuple[list[int], list[dict[int, float]]]]
    digests: dict[str, str]

    @classmethod
    def by(cls, llm: Any) -> "Served":
        """Ask an engine."""
        return cls(_generate(llm), llm.collective_rpc("digests")[0])


def measure(service: Service, folder: Path) -> Iterator[Measurement]:
    """Serve A, sync B, lose a trainer, sync A; compare with fresh engines."""
    case = CASES[service.checkpoint]
    a, b = (
        write_checkpoint(case, seed, folder / f"{service.checkpoint}-{seed}", True)
        for seed in (SEED_A, SEED_B)
    )
    with engine(b) as llm:
        fresh_b = Served.by(llm)
    with engine(a) as llm:
        fresh_a = Served.by(llm)
        trainer = Trainer(llm, _bucket(folder), service.cloned)
        chunks = trainer.sync(case.tensors(SEED_B))
        outcome, detail = _compare(Served.by(llm), fresh_a, fresh_b, chunks)
        yield Measurement(service.synced, outcome, detail)
        yield _lose_trainer(service, llm, trainer, fresh_a)


@contextmanager
def engine(folder: Path) -> Iterator[Any]:
    """Serve a checkpoint.

    Raises:
        CannotServe: The engine does not start.
    """
    from vllm import LLM

    try:
        llm = LLM(
            str(folder),
            enforce_eager=True,
            max_model_len=256,
            # Kernels for AMX round by what else is in a batch.
            max_num_seqs=1,
            worker_extension_cls="demo.worker.BucketWorker",
            disable_log_stats=True,
        )
    except Exception as error:
        raise CannotServe(describe(error)) from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _generate(llm: Any) -> list[tuple[list[int], list[dict[int, float]]]]:
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, logprobs=LOGPROBS, ignore_eos=True
    )
    outputs = [each.outputs[0] for each in llm.generate(PROMPTS, greedy)]
    return [
        (list(output.token_ids), [_values(step) for step in output.logprobs])
        for output in outputs
    ]


def _values(step: dict[int, Any]) -> dict[int, float]:
    return {token: entry.logprob for token, entry in step.items()}


def _bucket(folder: Path) -> Path:
    path = folder / "bucket"
    path.write_bytes(bytes(BUCKET_BYTES))
    return path


def _compare(
    served: Served, old: Served, new: Served, chunks: int
) -> tuple[Outcome, str]:
    if old.answers == new.answers:
        raise ValueError("A and B answer alike: these prompts tell nothing")
    tokens = len(PROMPTS) * NEW_TOKENS
    if served == new:
        return Outcome.NEW, (
            f"{chunks} chunks; {tokens} tokens, their log-probabilities and "
            f"{len(new.digests)} tensors and numbers equal a fresh engine's"
        )
    whose = {str(old.answers): "of A", str(new.answers): "of B"}
    answers = whose.get(str(served.answers), "neither of A nor of B")
    differing = len(served.digests.items() ^ new.digests.items()) // 2
    return Outcome.WRONG, f"answers {answers}; {differing} tensors differ from B's"


def _lose_trainer(
    service: Service, llm: Any, trainer: Trainer, fresh_a: Served
) -> Measurement:
    tensors = list(CASES[service.checkpoint].tensors(SEED_A))
    try:
        trainer.die_half_way(tensors)
    except Exception as error:
        lost = describe(error)
    try:
        _generate(llm)
        return Measurement(service.died, Outcome.WRONG, "serves on", lost)
    except Exception as error:
        refusal = describe(error)
    try:
        trainer.sync(tensors)
        healed = Served.by(llm) == fresh_a
    except Exception as error:
        return Measurement(service.died, Outcome.BROKEN, describe(error), refusal)
    outcome = Outcome.FENCED if healed else Outcome.BROKEN
    return Measurement(service.died, outcome, "", refusal)


def main() -> None:
    """Measure one service; a vLLM that cannot serve it says so."""
    service = SERVICES[sys.argv[1]]
    try:
        for measurement in measure(service, Path(sys.argv[2])):
            measurement.report()
    except CannotServe as error:
        for title in (service.synced, service.died):
            Measurement(title, Outcome.ABSENT, error=str(error)).report()


if __name__ == "__main__":
    main()
