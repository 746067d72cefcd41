"""Compare: `python eval.py subjects='{base: nano, mine: RUN_FOLDER}'`. The same command as `sdft-eval`."""

from sdft.evaluation.__main__ import main

if __name__ == "__main__":
    main()
