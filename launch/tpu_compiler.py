"""The environment of a process that compiles for TPUs that are not here, to be set before jax."""

# jax itself stays on the CPU, libtpu looks for no TPU and no metadata server of a cloud, and
# several processes may load it at once.
ENVIRONMENT = dict(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    TPU_PROCESS_BOUNDS="1,1,1",
    TPU_CHIPS_PER_PROCESS_BOUNDS="2,2,1",
)
