from benchmarks.tuning.cli import app

app()
