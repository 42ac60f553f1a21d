"""Seconds of a zero-shot task: our folders beside transformers, both through the harness.

    python -m benchmarks.task_seconds MODEL [--ours OUT...] --tasks A,B [--task-folder DIR] \\
        [--limit 100] [--dtypes float32,bfloat16] [--batch-size 16] [--repeats 3] [--json FILE] \\
        [--keep]

It needs the extras evaluation and torch. MODEL is a folder that transformers opens: the harness's
own class for it, HFLM, runs it in each type, in batches of --batch-size requests. MODEL and each
of --ours run by SingleQuantLM, which makes batches by tokens. All take turns, in one process and on
the same threads. The first turn is not counted. The seconds are those of the harness's requests
with tokenizing, without the reading of documents. A ratio is of medians of the run.
"""

import argparse
import sys
import time

import singlequant as sq
from singlequant import _C
from singlequant.harness import SingleQuantLM
from singlequant.harness.run import found_tasks

from . import common


def transformers_model(folder, dtype, batch_size):
    """The harness's own face of a transformers model, on the CPU."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype=dtype, batch_size=batch_size)


def engines(arguments):
    """The harness's models by name; the first is what the others are compared with."""
    found = {f"transformers {dtype}":
             transformers_model(arguments.model, dtype, arguments.batch_size)
             for dtype in arguments.dtypes}
    for folder in [arguments.model, *arguments.ours]:
        model = sq.load(folder)
        config = model.checkpoint.quant_config
        name = model.checkpoint.dtype if config is None else config.scheme
        found[f"singlequant {name}"] = SingleQuantLM(model, progress=False)
    return found


def run_once(model, task, manager, limit):
    """(seconds of the requests, metrics) of a task on one of the harness's models."""
    import lm_eval

    spent, scored = 0.0, model.loglikelihood

    def timed(*given, **options):
        nonlocal spent
        begin = time.perf_counter()
        answers = scored(*given, **options)
        spent += time.perf_counter() - begin
        return answers

    model.loglikelihood = timed
    try:
        results = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager,
                                          limit=limit, bootstrap_iters=0, log_samples=False)
    finally:
        del model.loglikelihood
    return spent, results["results"][task], results["n-samples"][task]["effective"]


def rows_of(task, models, manager, arguments, out):
    """A row for each model; prints them to out, as the harness is kept quiet."""
    seconds = {name: [] for name in models}
    found = {}
    for turn in range(arguments.repeats + 1):
        for name, model in models.items():
            spent, metrics, questions = run_once(model, task, manager, arguments.limit)
            found[name] = metrics, questions
            if turn:
                seconds[name].append(spent)
    first = common.summary(seconds[next(iter(models))])["median"]
    rows = []
    for name, (metrics, questions) in found.items():
        times = common.summary(seconds[name])
        accuracy = metrics.get("acc,none")
        rows.append({"task": task, "model": name, "questions": questions, "acc": accuracy,
                     **times, "times_as_fast": first / times["median"]})
        shown = "" if accuracy is None else f"{accuracy:.4f}"
        print(f"{task:<20} {name:<24} {questions:>9} {shown:>8} {times['median']:9.2f} "
              f"({times['low']:.2f}-{times['high']:.2f}) {first / times['median']:8.2f}",
              file=out, flush=True)
    return rows


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--ours", nargs="+", default=[], metavar="OUT", help="packed folders")
    parser.add_argument("--tasks", required=True, metavar="A,B")
    parser.add_argument("--task-folder", metavar="DIR")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="documents of a task")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of transformers' model")
    parser.add_argument("--batch-size", type=int, default=16, help="requests, in transformers")
    parser.add_argument("--repeats", type=int, default=3)
    common.add_output(parser, "task-seconds")
    arguments = parser.parse_args(argv)
    arguments.tasks, arguments.dtypes = arguments.tasks.split(","), arguments.dtypes.split(",")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    import lm_eval
    import torch
    import transformers

    torch.set_num_threads(_C.get_num_threads())
    environment = common.environment(argv) | {
        "torch": torch.__version__, "transformers": transformers.__version__,
        "lm_eval": lm_eval.__version__}
    common.print_environment(environment)
    print(f"lm_eval {lm_eval.__version__}, transformers {transformers.__version__}, torch "
          f"{torch.__version__}, {_C.get_num_threads()} threads")
    print(f"{'task':<20} {'model':<24} {'questions':>9} {'acc':>8} {'seconds':>9} (quartiles) "
          f"{'times as fast':>15}", flush=True)
    rows, models, out = [], engines(arguments), sys.stdout
    with found_tasks(arguments.tasks, arguments.task_folder) as manager:
        for task in arguments.tasks:
            rows += rows_of(task, models, manager, arguments, out)
    common.write_result({"environment": environment, "rows": rows}, arguments.json,
                        arguments.keep and "task-seconds")


if __name__ == "__main__":
    main()
