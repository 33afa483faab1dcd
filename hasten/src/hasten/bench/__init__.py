"""Measure: everything that compares ways of sampling.

subject       what is measured: a pipeline, its prompts, its grader
requests      method expressions, read before any model is loaded
arms          one way of sampling each; plain samplers in `plain`, resolution methods in `resolution_arms`, other
              libraries in `peers`; `thresholds` brings methods with a threshold to a number of computed steps
sampling      one call, timed and counted
measurements  from images to the figures of a row, by `hasten.quality.metrics` and `edits`
row           the one record and its columns; `result` is the file, `tables` its table, Markdown and CSV
runner        all arms on all prompts, in turns; `partial` keeps what is measured
tune          learns, then measures; `recording` keeps what calibration records
report        HTML; `pages`, `sheet`, `video`, `stream_report` and `token_plots` draw
streams       the same for models that stream video, by `rollout`
"""
