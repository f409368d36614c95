#!/usr/bin/env bash
# A Ray cluster for one command, on hosts where other Rays may run: ports and a directory of its own, and it ends only
# what it has started. `ray symmetric-run` does the same where a host is yours alone.
#
#   own_ray.sh RANK NODES HEAD BASE_PORT RAY_START_OPTIONS... -- COMMAND...
#
# To be started on every node at once, with RANK from 0 to NODES - 1, the name or address HEAD of rank 0's node, and a
# BASE_PORT from which on 200 ports are free on all nodes. The command runs on rank 0, and its exit code is rank 0's.
set -euo pipefail

if (($# < 6)) || [[ " $* " != *" -- "* ]]; then
  echo "error: own_ray.sh takes RANK NODES HEAD BASE_PORT RAY_START_OPTIONS... -- COMMAND..., got: $*" >&2
  exit 2
fi
rank=$1 nodes=$2 head=$3 base=$4
shift 4
options=()
while [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
shift

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
: "${RAY_AUTH_TOKEN_PATH:?must name a file with the token, which all nodes read and nobody else}"
places=$(mktemp --directory "/tmp/ray-XXXXXX") # short, for the names of sockets lie in it
ports=(
  --node-manager-port=$((base + 1)) --object-manager-port=$((base + 2))
  --dashboard-agent-listen-port=$((base + 3)) --dashboard-agent-grpc-port=$((base + 4))
  --runtime-env-agent-port=$((base + 5)) --metrics-export-port=$((base + 6))
  --min-worker-port=$((base + 20)) --max-worker-port=$((base + 199))
)

end() {
  kill "$ray" 2>/dev/null || true # `ray start --block` ends its processes, and no others
  wait "$ray" 2>/dev/null || true
  rm -rf "$places"
}

if ((rank > 0)); then
  # The head may be later than this node.
  until (exec 3<>"/dev/tcp/$head/$base") 2>/dev/null; do sleep 1; done
  ray start --block --address="$head:$base" --temp-dir="$places" "${ports[@]}" "${options[@]}" &
  ray=$!
  trap end EXIT
  trap 'exit 143' TERM
  # Ray itself would wait for a minute for a head that has gone.
  missed=0
  while kill -0 "$ray" 2>/dev/null && ((missed < 5)); do
    sleep 2
    if (exec 3<>"/dev/tcp/$head/$base") 2>/dev/null; then missed=0; else missed=$((missed + 1)); fi
  done
  exit 0
fi

ray start --block --head --port="$base" --temp-dir="$places" --include-dashboard=true \
  --dashboard-host=127.0.0.1 --dashboard-port=$((base + 7)) --ray-client-server-port=$((base + 8)) \
  "${ports[@]}" "${options[@]}" >"$places/ray.log" &
ray=$!
trap end EXIT
trap 'exit 143' TERM
export RAY_ADDRESS="$head:$base"
python - "$nodes" <<'PYTHON'
import sys, time
import ray

deadline = time.monotonic() + 300
while True:
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        if sum(node["Alive"] for node in ray.nodes()) >= int(sys.argv[1]):
            break
    except Exception as error:
        if time.monotonic() > deadline:
            sys.exit(f"error: Ray did not start: {error}")
    if time.monotonic() > deadline:
        sys.exit(f"error: after 300 s Ray has {len(ray.nodes())} of {sys.argv[1]} nodes; look at the logs of the others.")
    time.sleep(1)
PYTHON

"$@" &
command=$!
trap 'kill -TERM "$command" 2>/dev/null; wait "$command"; exit 143' TERM # a run saves what it can, and says so
wait "$command"
