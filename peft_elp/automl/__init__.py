"""From a folder of labelled recordings to an adapter with a report: `peft_elp.train` and `peft-elp train`.

Files in the order of the work: `look` at the recordings, `split` them into folds, compute `features` once, train
`reader`s of them in a `search`, save the chosen one (`train`) and `report` what it is worth.
"""
