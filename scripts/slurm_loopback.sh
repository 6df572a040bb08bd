#!/usr/bin/env bash
# A real Slurm of one node on loopback, to try `sweep --launcher slurm` on: Debian's slurm-wlm and munge, started by hand as root.
# usage: slurm_loopback.sh start|stop [FOLDER]    then: export SLURM_CONF=FOLDER/slurm.conf
set -euo pipefail
what=${1:?start or stop}
folder=$(realpath -m "${2:-out/slurm}")

stop() {
  for name in slurmd slurmctld munged; do
    [ ! -f "$folder/$name.pid" ] || kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
  done
}

start() {
  for program in munged slurmctld slurmd; do
    command -v $program >/dev/null || { echo "$program is missing: apt-get install slurm-wlm munge" >&2; exit 2; }
  done
  mkdir -p "$folder"/{state,spool,munge}
  chmod 755 "$folder"
  chmod 711 "$folder/munge"
  (umask 077; head -c 1024 /dev/urandom > "$folder/munge.key")
  munged --force --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" --socket="$folder/munge/socket" \
    --seed-file="$folder/munge.seed" --log-file="$folder/munged.log"
  host=$(hostname -s)
  # No cgroups and no accounting: what a container has.
  cat > "$folder/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ReturnToService=2
KillWait=10
MinJobAge=10
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
  export SLURM_CONF=$folder/slurm.conf
  slurmctld
  slurmd
  for _ in $(seq 30); do
    if [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; then
      sinfo
      echo "export SLURM_CONF=$folder/slurm.conf"
      return
    fi
    sleep 1
  done
  echo "the node did not come up; see $folder/slurmctld.log and $folder/slurmd.log" >&2
  exit 1
}

stop
[ "$what" = stop ] || start
