package criu

import (
	"strings"
	"testing"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

func TestCanLazyRestore(t *testing.T) {
	for version, want := range map[string]bool{"4.2": true, "4.2.1": true, "4.3": true, "5.0": true, "4.1.1": false, "3.19": false, "": false, "git": false} {
		if got := CanLazyRestore(version); got != want {
			t.Errorf("%q: %v", version, got)
		}
	}
}

// TestLazyPagesLine: only a lazy restore has the option; with it a dump would
// serve its pages instead of writing them.
func TestLazyPagesLine(t *testing.T) {
	for _, tcp := range []checkpoint.TCP{checkpoint.TCPClose, checkpoint.TCPKeep} {
		for want, o := range map[bool]ConfigOptions{true: RestoreOptions(tcp, true), false: DumpOptions(tcp)} {
			if got := strings.Contains(Config(o), "lazy-pages\n"); got != want {
				t.Errorf("%q: lazy %v", Config(o), got)
			}
		}
		if strings.Contains(Config(RestoreOptions(tcp, false)), "lazy") {
			t.Error("a plain restore is lazy")
		}
	}
}
