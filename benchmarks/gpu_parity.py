"""Log-probabilities of the whole engine against transformers, teacher-forced, with a real model, on a GPU or a CPU.

    python benchmarks/gpu_parity.py --model .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --rows .cache/data/demo.parquet

The engine answers the rows greedily (prefix cache, chunks, CUDA graphs); transformers then reads prompt and answer in
one forward. Compared at every position: what decode steps gave for the answer's tokens, and what prompt chunks give
for all tokens. transformers in float32 is the yardstick for the error that bfloat16 itself brings to either side, and
its two attentions in bfloat16, sdpa and eager, are for what another order of sums alone changes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import torch  # noqa: E402
from common import describe_machine, messages, table  # noqa: E402


def engine_logprobs(args: argparse.Namespace, dtype: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each row: ids of prompt and answer, log-probabilities of decode steps and of prompt chunks."""
    from rayinfer import LLM, SamplingParams

    llm = LLM(args.model, dtype=dtype, max_model_len=2048, gpu_memory_utilization=0.5, device=args.device)
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, logprobs=0)
    answers = llm.chat([messages(row) for row in rows], params, use_tqdm=False, on_error="raise")
    results = []
    for output in answers:
        done = output.outputs[0]
        own = [entry[token].logprob for entry, token in zip(done.logprobs, done.token_ids, strict=True)]
        results.append({"ids": output.prompt_token_ids + done.token_ids, "decode": own})
    forced = llm.generate(
        [{"prompt_token_ids": r["ids"]} for r in results],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
        on_error="raise",
    )
    for result, output in zip(results, forced, strict=True):
        pairs = zip(output.prompt_logprobs[1:], result["ids"][1:], strict=True)
        result["prefill"] = [entry[token].logprob for entry, token in pairs]
    return results


def reference_logprobs(
    args: argparse.Namespace, dtype: torch.dtype, results: list[dict[str, Any]], attention: str = "sdpa"
) -> list[list[float]]:
    """transformers' log-probability of each token but the first, given those before it."""
    from transformers import AutoModelForCausalLM

    path = Path(args.model)
    source = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, attn_implementation=attention)
    model = model.to(args.device).eval()
    wanted = []
    with torch.inference_mode():
        for result in results:
            ids = torch.tensor(result["ids"], device=args.device)
            logprobs = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
            wanted.append(logprobs.gather(1, ids[1:, None])[:, 0].tolist())
    return wanted


def difference(a: list[list[float]], b: list[list[float]]) -> torch.Tensor:
    """Absolute differences at every position of all rows."""
    pairs = [(torch.tensor(x[len(x) - len(y) :]), torch.tensor(y)) for x, y in zip(a, b, strict=True)]
    return torch.cat([(x - y).abs() for x, y in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="Parquet with a `text` column")
    parser.add_argument("--num-rows", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    import pyarrow.parquet as pq

    rows = pq.read_table(args.rows).slice(0, args.num_rows).to_pylist()
    lines, figures = [], {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        ours = engine_logprobs(args, name, rows)
        same = reference_logprobs(args, dtype, ours)
        exact = same if dtype == torch.float32 else reference_logprobs(args, torch.float32, ours)
        pairs = {
            f"engine {name} (decode) - transformers {name}": difference(same, [r["decode"] for r in ours]),
            f"engine {name} (prefill) - transformers {name}": difference(same, [r["prefill"] for r in ours]),
        }
        if exact is not same:
            pairs["engine bfloat16 (decode) - transformers float32"] = difference(exact, [r["decode"] for r in ours])
            pairs["engine bfloat16 (prefill) - transformers float32"] = difference(exact, [r["prefill"] for r in ours])
            pairs["transformers bfloat16 - transformers float32"] = difference(exact, same)
            eager = reference_logprobs(args, dtype, ours, "eager")
            pairs["transformers bfloat16, eager attention - sdpa"] = difference(same, eager)
        for label, diff in pairs.items():
            quantile = torch.quantile(diff.double(), 0.999).item()
            lines.append([label, diff.numel(), f"{diff.max():.2e}", f"{quantile:.2e}", f"{diff.mean():.2e}"])
            figures[label] = {"positions": diff.numel(), "max": diff.max().item(), "p999": quantile}
    print(f"`python benchmarks/gpu_parity.py {' '.join(sys.argv[1:])}`", describe_machine(), sep="\n\n", end="\n\n")
    print(table(["log-probability difference", "positions", "max", "99.9 %", "mean"], lines))
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
