"""Time and memory of a model under a parallel strategy, without the devices. Proteus, arXiv:2306.02267 (TPDS 35(10), 2024).

    model       ops.Model               what is computed: operators with named, typed iteration dims (section 4.1)
    strategy    strategy_tree           how it is cut, stored and ordered: configs on a tree of paths (section 4)
    cluster     cluster                 where: devices and named meshes
    compile     compiler.compile        model + strategy -> execution_graph.ExecutionGraph, plain data (section 5)
    prove       interpreter.run         executes that graph on numpy shards: a strategy that compiles computes what the model computes

Plain Python and numpy: nothing here imports torch or needs a device.
"""
