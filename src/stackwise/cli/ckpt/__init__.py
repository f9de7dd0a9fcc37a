"""`stackwise ckpt`: the commits of a run."""

from __future__ import annotations

import typer

from stackwise.cli.ckpt import care, copies, inside, look

app = typer.Typer(no_args_is_help=True, short_help="List, check, keep and copy the commits of a run.")


@app.callback()
def ckpt() -> None:
    """List, check, keep and copy the commits of a run.

    A commit is one whole state of a run: weights, optimizer, position in the data, counters. COMMIT is latest, best
    (lowest validation loss), a pin such as stage-02, step:120, or the beginning of an id.

    Reading needs no lock: everything but prune, pin, unpin and repair works while the run trains.

    \b
    Examples:
      stackwise ckpt ls demo
      stackwise ckpt diff demo stage-01 stage-02
      stackwise ckpt verify demo
      stackwise ckpt fork demo stage-02 warmer training.optimizer.lr=3e-4
    """


app.command("ls")(look.ls)
app.command("show")(look.show)
app.command("diff")(inside.diff)
app.command("du")(inside.du)
app.command("cat")(inside.cat)
app.command("verify")(care.verify)
app.command("prune")(care.prune)
app.command("pin")(care.pin)
app.command("unpin")(care.unpin)
app.command("repair")(care.repair)
app.command("fork")(copies.fork)
app.command("export")(copies.export)
app.command("import")(copies.import_)
