"""The report: run folders in, tables, plots, a verdict and one page out. It imports no torch, transformers or trl.

`runs` reads folders, `observe` turns a run into rates, `stats` holds the formulas, `compare` pairs the arms, `verdict`
judges them, `tables`, `plots` and `page` show it, `build` does it all in order. What each number is: docs/report.md.
"""
