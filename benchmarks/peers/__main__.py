from benchmarks.peers.cli import app

app(prog_name="python -m benchmarks.peers")
