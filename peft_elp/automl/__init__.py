"""From a folder of labelled recordings to an adapter with a report: `peft_elp.train` and `peft-elp train`.

The files in the order of the work: `look` at the recordings, `split` them into folds, compute the `features` once,
train `reader`s of them in a `search`, train the best further on the recordings (`live`), save it (`train`), and
`report` what it is worth. Texts are trained on the recordings at once (`transcribe`).
"""

try:
    import datasets as datasets
    import optuna as optuna
    import sklearn as sklearn
    import soundfile as soundfile
    import soxr as soxr
except ImportError as error:
    raise ImportError(f"peft_elp.train needs further packages ({error}): pip install 'peft-elp[train]'") from error
