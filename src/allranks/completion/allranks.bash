# What TAB offers after `allranks` in bash. In ~/.bashrc:  eval "$(allranks completion bash)"
_allranks() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$'\n' word head
    COMPREPLY=($("$1" completion --line "$line" 2>/dev/null))
    # bash cuts words at `=` and `:`, and wants only what follows the last cut.
    word=${line##*[[:space:]]}
    head=${word%"${word##*[=:]}"}
    COMPREPLY=("${COMPREPLY[@]#"$head"}")
    # No space after `model=`, `trainer.` or a folder: the word goes on.
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/.] ]]; then compopt -o nospace; fi
}
complete -o default -o nosort -F _allranks allranks
