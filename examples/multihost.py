"""Training on several hosts: the clippers see one gradient, whoever holds it.

    python examples/multihost.py

starts two processes with two CPU devices each on this machine, as two hosts would be. On a cluster
start the same script once on every host:

    python examples/multihost.py --num-processes 2 --process-id 0 --coordinator host0:8476
    python examples/multihost.py --num-processes 2 --process-id 1 --coordinator host0:8476

A small network in plain JAX learns the text of the Python standard library, in
`_multihost_training.py`. Parameters, optimizer state and batch are split over all devices of all
processes (FSDP); nothing about the clippers is configured for that. Process 0 prints the loss and
what each clipper did. Every few steps all processes write an Orbax checkpoint to `--out`, which
must be a folder they share, and a run that finds one goes on from it, bit for bit as if it had not
been interrupted, clippers included.

When a process dies the others cannot go on. On CPU the next collective fails at once; elsewhere JAX
itself ends them when no heartbeat has come for 30 seconds. Either way they say so and exit
with an error: start all of them again with the same command.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from _launch import launch


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-processes", type=int, default=2)
    parser.add_argument("--process-id", type=int, help="this process; without it all start here")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    parser.add_argument("--devices", type=int, default=2, help="CPU devices of each, started here")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path("out/multihost"), metavar="FOLDER")
    parser.add_argument(
        "--die", type=int, nargs=2, metavar=("PROCESS", "STEP"), help="a process kills itself"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Starts all processes, or is one of them."""
    options = parse(argv)
    if options.process_id is None:
        command = [sys.executable, __file__, *argv]
        return launch(command, options.num_processes, options.devices, options.out)
    from _multihost_training import train

    train(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
