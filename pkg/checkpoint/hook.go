package checkpoint

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Hook is what is done in a container after a restore: a command that is run in
// it, or a signal for its first process.
type Hook struct {
	Args   []string       // of the command, none for a signal
	Signal syscall.Signal // 0 for a command
}

// hookSignals are those by which programs are told something. None of them ends,
// stops or continues what handles it or, as the first process of a pid
// namespace, ignores it.
var hookSignals = map[string]syscall.Signal{
	"SIGHUP": syscall.SIGHUP, "SIGUSR1": syscall.SIGUSR1, "SIGUSR2": syscall.SIGUSR2,
	"SIGURG": syscall.SIGURG, "SIGWINCH": syscall.SIGWINCH, "SIGIO": syscall.SIGIO,
}

// Real-time signals, without those that the C library keeps for itself.
const (
	minRealTime = 34
	maxRealTime = 64
)

// ParseHook reads "signal SIGNAL" or "exec COMMAND". A signal is one of SIGHUP,
// SIGUSR1, SIGUSR2, SIGURG, SIGWINCH and SIGIO, by name or number, or a real-time
// signal by its number, 34 to 64. For the command see [ParseCommand]. Errors wrap
// [ErrInvalid].
func ParseHook(v string) (Hook, error) {
	verb, rest, _ := strings.Cut(v, " ")
	switch verb {
	case "signal":
		rest = strings.TrimSpace(rest)
		if sig, ok := hookSignals[rest]; ok {
			return Hook{Signal: sig}, nil
		}
		n, err := strconv.Atoi(rest)
		sig := syscall.Signal(n)
		for _, known := range hookSignals {
			if err == nil && (sig == known || n >= minRealTime && n <= maxRealTime) {
				return Hook{Signal: sig}, nil
			}
		}
		return Hook{}, fmt.Errorf("signal %q, want SIGHUP, SIGUSR1, SIGUSR2, SIGURG, SIGWINCH, SIGIO, a number of these, or %d to %d: %w",
			rest, minRealTime, maxRealTime, ErrInvalid)
	case "exec":
		args, err := ParseCommand(rest)
		if err != nil {
			return Hook{}, err
		}
		return Hook{Args: args}, nil
	}
	return Hook{}, fmt.Errorf("%q, want \"signal SIGNAL\" or \"exec COMMAND\": %w", v, ErrInvalid)
}

// ParseCommand reads a command that is to be run in a container: a JSON list of
// strings is run as it is, anything else by the container's /bin/sh. Errors wrap
// [ErrInvalid].
func ParseCommand(v string) ([]string, error) {
	v = strings.TrimSpace(v)
	args := []string{"/bin/sh", "-c", v}
	if strings.HasPrefix(v, "[") {
		args = nil
		if err := json.Unmarshal([]byte(v), &args); err != nil {
			return nil, fmt.Errorf("command %q, want one for the shell, or a JSON list of strings: %w: %w", v, err, ErrInvalid)
		}
	}
	switch {
	case v == "" || len(args) == 0 || args[0] == "":
		return nil, fmt.Errorf("no command: %w", ErrInvalid)
	case slices.ContainsFunc(args, func(a string) bool { return strings.ContainsRune(a, 0) }):
		return nil, fmt.Errorf("command %q holds a zero byte: %w", v, ErrInvalid)
	}
	return args, nil
}
