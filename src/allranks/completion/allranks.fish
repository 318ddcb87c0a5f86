# What TAB offers after `allranks` in fish. In ~/.config/fish/config.fish:  allranks completion fish | source
function __allranks
    set -l found (allranks completion --line (commandline -cp | string collect) 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c allranks -f -k -a '(__allranks)'
