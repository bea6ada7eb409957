package testenv

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// recorder is a test that notes its end instead of ending.
type recorder struct {
	testing.TB
	outcome string
}

func (r *recorder) Helper() {}
func (r *recorder) Fatalf(format string, a ...any) {
	r.outcome = "fail: " + fmt.Sprintf(format, a...)
	runtime.Goexit()
}
func (r *recorder) Skipf(format string, a ...any) {
	r.outcome = "skip: " + fmt.Sprintf(format, a...)
	runtime.Goexit()
}

func need(what ...Feature) string {
	r := &recorder{outcome: "run"}
	done := make(chan struct{})
	go func() {
		defer close(done)
		Need(r, what...)
	}()
	<-done
	return r.outcome
}

func TestNeed(t *testing.T) {
	for _, tt := range []struct {
		name, node, require, want string
		what                      []Feature
	}{
		{name: "nothing", want: "run"},
		{name: "present", node: "1", require: "node", what: []Feature{Node}, want: "run"},
		{name: "missing", what: []Feature{Node}, want: "skip: needs node"},
		{name: "missing, another required", require: "root,runc", what: []Feature{Node}, want: "skip: needs node"},
		{name: "missing and required", require: "root, node", what: []Feature{Node}, want: "fail: STASIS_REQUIRE names node"},
		{name: "unknown", what: []Feature{"teleport"}, want: "skip: needs teleport"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("STASIS_NODE", tt.node)
			t.Setenv("STASIS_REQUIRE", tt.require)
			if got := need(tt.what...); !strings.HasPrefix(got, tt.want) {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}

func TestPrivateMounts(t *testing.T) {
	Need(t, Root)
	dir := t.TempDir()
	done := make(chan struct{})
	t.Run("inside", func(t *testing.T) {
		PrivateMounts(t)
		Mount(t, "tmpfs", dir, "size=64k")
		if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		go func() { // another goroutine is outside
			defer close(done)
			if _, err := os.Stat(filepath.Join(dir, "f")); !os.IsNotExist(err) {
				t.Errorf("the mount is seen outside: %v", err)
			}
		}()
		<-done
	})
	if names, err := os.ReadDir(dir); err != nil || len(names) != 0 {
		t.Errorf("after the test %v %v, want nothing", names, err)
	}
}
