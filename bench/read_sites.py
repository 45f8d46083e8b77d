"""Reading sites: time and peak memory of headwise, plain transformers, TransformerLens and nnsight, side by side.

python bench/read_sites.py [--rounds 7] [--threads 1] [--envs FOLDER] [--model FOLDER]
"""

import argparse

import env
import race

NAMES = ["bare", "headwise", "hooks", "transformer_lens", "nnsight"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--envs")
    parser.add_argument("--model", help="model folder; the default model where absent")
    parser.add_argument("--contestants", nargs="*", default=NAMES)
    options = parser.parse_args()
    from transformers import AutoConfig

    from headwise.models import default_model_path

    folder = options.model or str(default_model_path())
    import torch

    torch.manual_seed(0)
    ids = torch.randint(100, AutoConfig.from_pretrained(folder).vocab_size, (8, 128))
    envs = env.folder_of(options.envs)
    found = race.particulars(envs, options.contestants, options.threads)
    for job in ("reads", "patterns"):
        with race.Race(options.contestants, job, folder, {"ids": ids}, options.threads, envs) as runners:
            sums = {}
            for name in options.contestants:
                sums[name] = runners.turn(name, keep=False)["value"]
                runners.turn(name, keep=False)
            for _ in range(options.rounds):
                for name in options.contestants:
                    runners.turn(name)
            found[job] = {
                "table": runners.table("bare"),
                "sums": sums,
                "loads": [r["load"] for r in runners.runs["bare"]],
            }
        print(job, found[job])
    race.save("read_sites", found)


if __name__ == "__main__":
    main()
