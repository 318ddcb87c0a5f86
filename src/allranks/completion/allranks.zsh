# What TAB offers after `allranks` in zsh. In ~/.zshrc, after compinit:  eval "$(allranks completion zsh)"
_allranks() {
    local -a found open closed
    # The words of this command alone: others may stand before it in the line, as in `cd X && allranks`.
    found=("${(@f)$(allranks completion --line "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    found=(${found:#})
    if (( $#found == 0 )); then
        _files
        return
    fi
    # No space after `model=`, `trainer.` or a folder: the word goes on.
    open=(${(M)found:#*[=/.]})
    closed=(${found:#*[=/.]})
    (( $#open )) && compadd -V open -S '' -- $open
    (( $#closed )) && compadd -V closed -- $closed
}
compdef _allranks allranks
