"""Train one of the demo's configs, and write its checkpoint and log beside this file.

The checkpoint holds weights in float16 and the class names, nothing else, and loads
with ``weights_only=True``. The numbers printed last are those of the file that was
written, as a stock ``Runner.test`` reads it from disk.

Usage: python demo/train.py configs/demo/upernet_swin-demo.py [--load-from CHECKPOINT]
    [--threads 2]
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from generate_data import generate
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

DEMO = Path(__file__).parent


def widen_start(backbone: nn.Module) -> None:
    """Draw a thin backbone's linear layers anew: Swin's deviation of 0.02 is for wide
    ones, and leaves these silent.
    """
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


def plain(entry: Any) -> Any:
    """A class name as it is, a colour as a list of plain integers."""
    return entry if isinstance(entry, str) else [int(value) for value in entry]


def save_weights(runner: Runner, path: Path) -> None:
    """Write the weights in float16 and the data set's names and colours."""
    state_dict = {
        name: value.half() if value.is_floating_point() else value
        for name, value in runner.model.state_dict().items()
    }
    metainfo = runner.train_dataloader.dataset.metainfo
    dataset_meta = {
        key: [plain(entry) for entry in metainfo[key]] for key in ('classes', 'palette')
    }
    partial = path.with_suffix('.partial')
    torch.save(
        {'state_dict': state_dict, 'meta': {'dataset_meta': dataset_meta}}, partial
    )
    os.replace(partial, path)


def log_lines(runner: Runner) -> list[str]:
    """Progress and results of a run's log, without the lines that describe the machine."""
    logs = Path(runner.log_dir).glob('*.log')
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return [line for line in lines if ' - Iter(' in line]


def run(config: Path, load_from: Path | None, work_dir: Path) -> dict[str, float]:
    """Train `config`, write the checkpoint and the log, and return the metrics of the
    checkpoint on disk.
    """
    checkpoint = DEMO / f'{config.stem}.pth'
    cfg = Config.fromfile(config)
    cfg.work_dir = str(work_dir)
    cfg.load_from = str(load_from) if load_from else None
    trainer = Runner.from_cfg(cfg)
    trainer.model.init_weights()
    widen_start(trainer.model.backbone)
    trainer.train()
    save_weights(trainer, checkpoint)

    cfg.load_from = str(checkpoint)
    tester = Runner.from_cfg(cfg)
    metrics: dict[str, float] = tester.test()
    checkpoint.with_suffix('.log').write_text(
        '\n'.join(log_lines(trainer) + log_lines(tester)) + '\n'
    )
    return metrics


def main() -> None:
    """Trains the config that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', type=Path)
    parser.add_argument(
        '--load-from',
        type=Path,
        help='checkpoint to start from, where names and shapes agree',
    )
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/NAME')
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generate(DEMO / 'data')
    print(
        run(
            args.config,
            args.load_from,
            args.work_dir or Path('work_dirs') / args.config.stem,
        )
    )


if __name__ == '__main__':
    main()
