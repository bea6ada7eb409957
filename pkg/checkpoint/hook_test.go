package checkpoint_test

import (
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

func TestParseHook(t *testing.T) {
	sh := func(script string) []string { return []string{"/bin/sh", "-c", script} }
	for v, want := range map[string]checkpoint.Hook{
		"signal SIGUSR2":                     {Signal: syscall.SIGUSR2},
		"signal  SIGHUP ":                    {Signal: syscall.SIGHUP},
		"signal 10":                          {Signal: syscall.SIGUSR1},
		"signal 28":                          {Signal: syscall.SIGWINCH},
		"signal 34":                          {Signal: 34},
		"signal 64":                          {Signal: 64},
		"exec reseed --all && true":          {Args: sh("reseed --all && true")},
		`exec ["/bin/x", "a b", ""]`:         {Args: []string{"/bin/x", "a b", ""}},
		`exec  [ "x" ] `:                     {Args: []string{"x"}},
		"exec signal SIGKILL":                {Args: sh("signal SIGKILL")},
		"exec : " + strings.Repeat("x", 200): {Args: sh(": " + strings.Repeat("x", 200))},
	} {
		got, err := checkpoint.ParseHook(v)
		if err != nil || got.Signal != want.Signal || !slices.Equal(got.Args, want.Args) {
			t.Errorf("%q: %+v, %v, want %+v", v, got, err, want)
		}
	}
	for _, v := range []string{
		"", "signal", "signal ", "signal 0", "signal -1", "signal 9", "signal 15", "signal 32", "signal 33", "signal 65", "signal 2147483658",
		"signal SIGKILL", "signal SIGSTOP", "signal SIGTERM", "signal SIGINT", "signal SIGQUIT", "signal USR2", "signal sigusr2", "signal SIGUSR2 SIGHUP",
		"exec", "exec ", "exec []", `exec [""]`, "exec [1]", "exec [x", `exec ["x"] y`, `exec ["a\u0000b"]`, "exec a\x00b",
		"SIGUSR2", " signal SIGUSR2", "Signal SIGUSR2", "signal\tSIGUSR2", "http http://localhost/",
	} {
		if got, err := checkpoint.ParseHook(v); !errors.Is(err, checkpoint.ErrInvalid) || got.Signal != 0 || got.Args != nil {
			t.Errorf("%q: %+v, %v", v, got, err)
		}
	}
}

// FuzzParseHook: what is accepted is one of both, and no signal is harmful.
func FuzzParseHook(f *testing.F) {
	for _, v := range []string{"signal SIGUSR2", "signal 40", "signal 9", "exec x", `exec ["x", "y"]`, "exec [", ""} {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, v string) {
		h, err := checkpoint.ParseHook(v)
		if err != nil {
			if !errors.Is(err, checkpoint.ErrInvalid) {
				t.Errorf("%q: %v", v, err)
			}
			return
		}
		if (h.Signal == 0) == (len(h.Args) == 0) || h.Signal == syscall.SIGKILL || h.Signal == syscall.SIGSTOP || h.Signal == syscall.SIGTERM || h.Signal < 0 || h.Signal > 64 {
			t.Errorf("%q: %+v", v, h)
		}
	})
}
