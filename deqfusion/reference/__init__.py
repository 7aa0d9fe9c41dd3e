"""The PyTorch implementation of the solves: oracle, CPU implementation and fallback by choice.

    cell         the equations, one step, differentiable (autograd), and their linearisation (JVP)
    norm         GroupNorm of centred rows and its VJP
    modality     a modality block prepared for iterating: one step, linearisation, parameter VJP
    fusion       the same for the fusion block
    joint        the same for the whole state, for comparison with the paper's traces
    accelerate   Anderson, Picard and Broyden: from the last evaluations to the next iterate
    iterate      the loop, written once: stopping, freezing, best iterate, restart, compaction
    solve        one function per operator: chunking, dtypes, statistics

It knows no Triton. Imports point downwards in this list's order, the last importing the others.
"""
