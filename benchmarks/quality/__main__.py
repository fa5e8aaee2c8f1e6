from benchmarks.quality.cli import app

app()
