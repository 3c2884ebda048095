"""Fuzzes all readers with atheris, coverage-guided: ``python -m tests.fuzz --runs
1000000 --seed 1``.

Each harness runs in processes of its own, two at a time, with a share of the runs; a
run ends by a crash (anything raised but a QuantizationError), a hang (30 s) or growth
of memory (MEMORY_MIB in all). The log has a line for each with its seed.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HANG_SECONDS = 30
MEMORY_MIB = 2048
"""torch and OpenMMLab take 700 MiB before anything is read, and libFuzzer its corpus
beside.
"""

GROWTH_MIB = 32
"""What one input may add to the peak; the files are of 50 KiB, and torch's allocator
takes more than it needs.
"""

SHARES = {
    'checkpoint_bytes': 2,
    'checkpoint_trees': 1,
    'packed_bytes': 6,
    'packed_trees': 1,
    'what_it_says': 8,
    'recipes': 8,
    'quantizer_tensors': 2,
    'progress_bytes': 4,
    'progress_trees': 1,
    'models': 6,
    'other_layouts': 4,
}
"""Cheap harnesses run more often."""


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def fuzz(name, runs, seed, corpus):
    """Runs one harness in this process; does not return."""
    import atheris

    with atheris.instrument_imports(
        include=['mmptq.checkpoints', 'mmptq.backbones.recipe', 'mmptq.quantizers']
    ):
        import mmptq.checkpoints.packed
        import mmptq.checkpoints.progress
        import mmptq.checkpoints.trusted  # noqa: F401

    import warnings

    import torch

    from . import harnesses

    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    harnesses.honest()
    for number in range(500):  # imports and what torch sets up once are not growth
        harnesses.run(name, random.Random(number).randbytes(64))

    def one(data):
        before = peak_mib()
        harnesses.run(name, data)
        if peak_mib() - before > GROWTH_MIB:
            raise MemoryError(f'one input took {peak_mib() - before} MiB')

    flags = [
        f'-runs={runs}',
        f'-seed={seed}',
        f'-timeout={HANG_SECONDS}',
        f'-rss_limit_mb={MEMORY_MIB}',
        '-max_len=256',
        '-len_control=0',
        '-print_final_stats=1',
        '-verbosity=0',
        f'-artifact_prefix={corpus}/',
    ]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
    atheris.Fuzz()


def started(name, runs, seed, folder):
    """Runs one harness in a process of its own; returns what the log says of it."""
    corpus = folder / name
    corpus.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        '-W',
        'ignore',
        '-m',
        'tests.fuzz',
        '--one',
        name,
        '--runs',
        str(runs),
        '--seed',
        str(seed),
        '--folder',
        str(folder),
    ]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, errors='replace')
    output = done.stdout + done.stderr
    found = {
        key: re.search(rf'stat::{key}:\s*(\d+)', output)
        for key in ('number_of_executed_units', 'peak_rss_mb')
    }
    executed, memory = (int(match[1]) if match else None for match in found.values())
    result = dict(
        harness=name,
        seed=seed,
        runs=executed,
        seconds=round(time.perf_counter() - begin),
        peak_rss_mib=memory,
        ended='whole' if done.returncode == 0 else 'crash',
    )
    if done.returncode:
        result['output'] = re.sub(r'INFO: Instrumenting .*\n', '', output)[-3000:]
    print(json.dumps(result), flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--runs', type=int, default=10_000, help='runs of all harnesses together'
    )
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument(
        '--folder',
        type=Path,
        default=Path('work_dirs/fuzz'),
        help='where inputs that crash are kept',
    )
    parser.add_argument('--log', type=Path, help='JSON file for the results')
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--only', nargs='+', choices=list(SHARES), default=list(SHARES))
    parser.add_argument('--one', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        fuzz(args.one, args.runs, args.seed, args.folder / args.one)
        return
    total = sum(SHARES[name] for name in args.only)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(
                started,
                name,
                -(-args.runs * SHARES[name] // total),
                args.seed,
                args.folder,
            )
            for name in args.only
        ]
        results = [job.result() for job in jobs]
    summary = dict(
        seed=args.seed,
        runs=sum(result['runs'] or 0 for result in results),
        crashes=sum(r['ended'] != 'whole' for r in results),
        harnesses=results,
    )
    print(f'{summary["runs"]} runs, {summary["crashes"]} crashes')
    if args.log:
        args.log.write_text(json.dumps(summary, indent=1) + '\n')
    sys.exit(1 if summary['crashes'] else 0)


if __name__ == '__main__':
    main()
