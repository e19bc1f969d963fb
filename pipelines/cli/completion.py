"""Shell completion of the command `vlv`, as a script without a call of Python: TAB must not wait for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHELLS = ("bash", "zsh")

# A shell splits `key=value` at the `=`: after it, files are completed.
_SCRIPT = """\
_vlv() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
    COMPREPLY=()
    [ "${{COMP_WORDS[COMP_CWORD-1]}}" = "=" ] && return
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{jobs}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    case "${{COMPREPLY[0]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -o bashdefault -o default -F _vlv vlv
"""


def completion(shell: str, words: Mapping[str, Sequence[str]]) -> str:
    """The script of a shell (SHELLS) that completes jobs, and the options and settings of each job."""
    cases = [f'            {job}) words="{" ".join(known)}" ;;' for job, known in words.items()]
    cases.append(f'            completion) words="{" ".join(SHELLS)}" ;;')
    script = _SCRIPT.format(jobs=" ".join([*words, "completion"]), cases="\n".join(cases))
    before = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return before + script
