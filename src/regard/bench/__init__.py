"""The benchmark suite behind ``regard bench``, ``regard report`` and ``regard profile``.

`cases` says what is measured, `peers` by which implementations, `verify` that a result is right before it is timed,
`measure` how long it takes, `run` puts them together into rows, `baselines` compares two runs, `report` shows them.

Measuring needs only torch (and triton on a GPU), so that it runs on a machine that has little else::

    from regard.bench import progress, run
    run.run(run.Options(suites=("fa3",), out="rows.jsonl"), progress.line)
"""
