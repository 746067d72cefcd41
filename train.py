"""Train: `python train.py experiment=dreamy_style`. The same command as `sdft-train` and `python -m sdft.training`."""

from sdft.training.__main__ import main

if __name__ == "__main__":
    main()
