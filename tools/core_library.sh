# Sourced by the scripts that compile the core without Python: build_core FOLDER SETS... makes
# FOLDER/libcore.a of it with $CC and the flags of setup.py, of which SETS are the instruction sets.
# sq_blas.c is left out, as it needs OpenBLAS. compile FILES... hands the same flags to $CC.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# COMMON_FLAGS, or the flags of one instruction set, as setup.py has them.
setup_flags() {
    "${PYTHON:-python3}" - "$1" <<'PYTHON'
import ast
import sys

values = {}
for node in ast.parse(open("setup.py").read()).body:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        try:
            code = compile(ast.Expression(node.value), "setup.py", "eval")
            values[node.targets[0].id] = eval(code, dict(values))
        except NameError:
            pass
wanted = sys.argv[1]
print(*(values[wanted] if wanted in values else values["KERNEL_FLAGS"][wanted][1]))
PYTHON
}

common_flags=$(setup_flags COMMON_FLAGS)
[ -n "$common_flags" ]
kernel_flags=
compile() { $CC $common_flags $have_flags -Werror "${core_flags[@]}" "$@"; }

build_core() {
    local build=$1 set source own
    have_flags=
    shift
    for set in "$@"; do
        have_flags="$have_flags -DSQ_HAVE_${set^^}=1"
    done
    for source in csrc/*/sq_*.c csrc/kernels/kernels_generic.c "${@/#/csrc/kernels/kernels_}"; do
        own=
        case $source in
            */sq_blas.c) continue ;;
            */kernels_generic.c) ;;
            */kernels_*) own="$(setup_flags "${source#*/kernels_}") $kernel_flags" source=$source.c ;;
        esac
        compile $own -c "$source" -o "$build/$(basename "$source" .c).o" &
        while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-2}" ]; do wait -n; done
    done
    while [ -n "$(jobs -rp)" ]; do wait -n; done
    ar rcs "$build/libcore.a" "$build"/*.o
    rm "$build"/*.o
}
