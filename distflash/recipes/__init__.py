"""The jobs that come with the package, as a user of its public API: train, evaluate, generate, uptrain.

A module here imports what `import distflash` gives, and `distflash.integrations`. Command lines: `distflash --help`.
"""
