"""Steps and seconds to a target, on small tasks that were fixed before the runs.

`tasks` → `rivals` (optimizers and their spaces) → `search` (which settings) → `run` (one run) →
`reach` (targets, and when they are reached) → `tables`.

The rule, written down first:

1.  Each of the optimizers has the same number of settings, drawn once from a space of its own by
    one quasi-random sequence, and each is run on one seed. No run stops early.
2.  A run's loss on fixed training and held-out examples is measured after every fifth step and
    averaged over the last three measurements. A run whose loss at its end is not finite, or above
    where it began, has diverged, and reached nothing.
3.  A task has a target in training and one in held-out loss. NAdamW's setting with the lowest such
    loss at the end of its run is run on three fresh seeds. The target is the median of their losses
    at the end, so that two of three reach it.
4.  For each target two settings of an optimizer are run on the same fresh seeds: that which reached
    the target in the fewest steps, and that of the lowest loss at its end. The median of the steps
    to the target counts, of the setting with the lower one. It is never if most seeds never reach
    the target. So NAdamW always does.
5.  Seconds are steps times the time of a step, which is measured apart, all optimizers in turn.
6.  In geometric means of ratios, never counts as twice the length of a run.
7.  One optimizer is better than another if the geometric mean over tasks of its steps (or
    seconds) relative to the other's is below one; what is claimed of `"centered"` is claimed of
    the held-back tasks, and only if it holds there and on all tasks. It has won if it has the
    fewest steps on at least half of the tasks, is within 1.25 of the fewest on nine in ten, needs
    at most 0.7 of NAdamW's steps and fewer than Muon, SOAP and NAdamW with the same cut, and fewer
    seconds than AdamW.
8.  Held-back tasks are not run while the formula of an optimizer is changed.
"""
