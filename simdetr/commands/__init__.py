"""The `simdetr` command.

In reading order:

    main        arguments -> one command
    method      what the commands of the method do
    mine        mine, cluster, rivals, encoder fit
    export      import and export
    quickstart  the whole method in minutes, offline
"""
