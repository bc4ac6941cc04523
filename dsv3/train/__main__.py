"""`python -m dsv3.train`: train from the command line; errors of the user end with one line and exit code 2."""

import os
import sys

from dsv3.train.options import Options, parse


def main(arguments: list[str]) -> int:
    """Parse, train, say where the results are."""
    try:
        return _train(parse(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _train(options: Options) -> int:
    import torch  # a wrong command line is refused before this takes its seconds

    from dsv3.config.rules import require
    from dsv3.parallel import joined
    from dsv3.train.loop import run

    available = options.device == "cpu" or torch.cuda.is_available()
    require(available, "--device", options.device, "torch sees no such device", "use --device cpu")
    local = f":{os.environ.get('LOCAL_RANK', 0)}" if options.device == "cuda" else ""
    device = torch.device(options.device + local)
    with joined(os.environ, device) as ranks:
        run(
            options.config,
            seed=options.seed,
            out=options.out,
            resume=options.resume,
            overwrite=options.overwrite,
            device=device,
            progress=not options.quiet,
            ranks=ranks,
        )
    if options.out is not None and ranks.first:
        print(f"{options.out}: log.jsonl, checkpoints; try python -m dsv3.generate --checkpoint {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
