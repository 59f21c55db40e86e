# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Run a checkpoint in which sums of factored terms stand for matrices.

A factored model is the stock model of its architecture in which the modules that `config.jaxmoe` names are replaced:
experts by `FactoredExperts`, single matrices by `FactoredLinear`. Router, gating rule, activation and biases remain
those of transformers.

The matrix of an expert's projection is the sum of the terms of all targets that cover it: `gate`, `up`, `gate_up` (the
two stacked along their outputs, gate first) and `down`. All parameters are two-dimensional, experts stacked along the
rows: serving engines take an experts module whose parameters are all three-dimensional for a stock one and replace it.
Whole numbers, such as ranks and places, are buffers: casts leave them alone.

A term whose matrix is the same for all experts is applied to every token once, whatever the number of its experts.

With `main_experts` in a module's record only so many of a token's experts run, those of the largest weights. Vectors of
the others, averaged by their weights, scale the inputs of the projections instead (Compressed Experts, arXiv
2503.00634). The stock router chooses and weighs; vectors and averages are float32 whatever the model is.
"""
