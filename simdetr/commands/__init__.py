"""The `simdetr` command.

In reading order:

    main        arguments -> one command
    prepare     before any training: doctor, split
    pretrain    pretrain, finetune, compare, report
    predict     predict, relabel, evaluate
    app         label
    labelling   autolabel, label-order, label-simulate
    mine        mine, cluster, rivals, encoder fit
    fit         Lightning's fit, validate and test
    devices     the devices of this machine and what can be used on them
    export      import and export
    quickstart  the whole method in minutes, offline
"""
