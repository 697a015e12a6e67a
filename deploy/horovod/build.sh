#!/usr/bin/env bash
# Builds the Horovod wheel against the torch of one Python environment and prints its path, nothing else, to stdout.
#
#   deploy/horovod/build.sh            CPU, gloo
#   deploy/horovod/build.sh --cuda     NVIDIA GPUs, NCCL (needs nvcc and the NCCL headers; see README.md)
#
# PYTHON chooses the environment (default: .venv/bin/python of this checkout); MAKEFLAGS the number of jobs.
# The wheel stays in .cache/wheels/ and is not built again. Its name carries what it was built against, since
# Horovod's extension links to one torch and fails to load, or worse, beside another.
set -euo pipefail

version=0.28.1
sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
wheels=$root/.cache/wheels
backend=gloo

case ${1-} in
    "") ;;
    --cuda) backend=nccl ;;
    *) echo "usage: $0 [--cuda]" >&2; exit 2 ;;
esac

torch=$("$python" -c 'import torch; print(torch.__version__)') || {
    echo "$0: $python has no torch; install the train extra there first, or name another Python in PYTHON" >&2
    exit 1
}
if [ "$backend" = nccl ] && ! "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    echo "$0: found torch $torch, which has no CUDA; --cuda needs one that has" >&2
    exit 1
fi
tag=$("$python" -c 'import sys; print("cp{}{}".format(*sys.version_info))')
local_version=$backend.torch${torch//[+-]/.}

found() { compgen -G "$wheels/horovod-$version+$local_version-$tag-*.whl" | head -n 1; }

if wheel=$(found) && [ -n "$wheel" ]; then
    echo "$wheel"
    exit 0
fi

if ! command -v g++ >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "$0: installing g++ and make" >&2
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ make; } >&2 || true
fi
for tool in g++ make; do
    command -v "$tool" >/dev/null || {
        echo "$0: found no $tool, expected one with C++20; install it with your system's package manager" >&2
        exit 1
    }
done
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$headers/Python.h" ] || {
    echo "$0: found no Python.h in $headers, expected the headers of $python; install them (Debian: python3-dev)" >&2
    exit 1
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The build tools live in an environment of their own, so that the target stays as it is; a .pth file lets the build
# see the target's torch. CMake 4 refuses the policy version that Horovod's third-party projects ask for.
"$python" -m venv "$scratch/venv" >&2
build=$scratch/venv/bin/python
"$build" -m pip install --quiet --disable-pip-version-check \
    'setuptools>=77,<85' wheel packaging cffi cloudpickle psutil pyyaml 'cmake>=3.25,<4' >&2
target=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$target" >"$("$build" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/target.pth"

echo "horovod==$version --hash=sha256:$sha256" >"$scratch/requirements.txt"
"$build" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation \
    --require-hashes --requirement "$scratch/requirements.txt" --dest "$scratch" >&2
tar -xf "$scratch/horovod-$version.tar.gz" -C "$scratch"
source=$scratch/horovod-$version

# 0.28.1 is the last release and asks for C++14; torch's headers need C++20 by now.
for file in CMakeLists.txt horovod/torch/CMakeLists.txt; do
    sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 20)/' "$source/$file"
    grep -q 'set(CMAKE_CXX_STANDARD 20)' "$source/$file" || {
        echo "$0: found no C++14 line in $file, expected one to raise to C++20; this is not Horovod $version" >&2
        exit 1
    }
done

# Nobody debugs it: without what that takes, the wheel is 1 MB instead of 19, and there sooner.
sed -i 's/RelWithDebInfo/Release/' "$source/setup.py"

export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1
export HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_CMAKE=$scratch/venv/bin/cmake HOROVOD_LOCAL_VERSION=$local_version
export MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}
if [ "$backend" = nccl ]; then
    export HOROVOD_GPU_OPERATIONS=NCCL
fi

mkdir -p "$wheels"
log=$wheels/build.log
PATH=$scratch/venv/bin:$PATH "$build" -m pip wheel --verbose --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir "$scratch/wheels" "$source" >"$log" 2>&1 || {
    grep -i -m 20 -A 3 'error' "$log" >&2 || tail -n 40 "$log" >&2
    echo "$0: Horovod did not build; all of it is in $log" >&2
    exit 1
}

mv "$scratch"/wheels/horovod-*.whl "$wheels/"
wheel=$(found)
[ -n "$wheel" ] || { echo "$0: the wheel is not named as expected; look into $wheels" >&2; exit 1; }
echo "$wheel"
