package shim

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2"
)

// TestOwnCgroup: what would freeze or kill the shim itself is never taken for a
// container's.
func TestOwnCgroup(t *testing.T) {
	if c, err := loadCgroup(os.Getpid(), "c"); err == nil {
		t.Errorf("loaded the shim's own cgroup: %+v", c)
	}
	for _, tc := range []struct {
		path, dir string
		want      bool
	}{
		{"/a/b", "/", true},
		{"/", "/", true},
		{"/a/b", "/a/b", true},
		{"/a/b", "/a", true},
		{"/a/b", "/a/b/c", false},
		{"/ab", "/a", false},
		{"/", "/a", false},
	} {
		if got := below(tc.path, tc.dir); got != tc.want {
			t.Errorf("below(%q, %q) = %v", tc.path, tc.dir, got)
		}
	}
}

func TestContainerGroup(t *testing.T) {
	for path, want := range map[string]string{
		"/kubepods/pod1/c1":                                 "/kubepods/pod1/c1",
		"/kubepods/pod1/c1/init.scope":                      "/kubepods/pod1/c1",
		"/pod.slice/cri-containerd-c1.scope":                "/pod.slice/cri-containerd-c1.scope",
		"/pod.slice/cri-containerd-c1.scope/system.slice/x": "/pod.slice/cri-containerd-c1.scope",
		"/c1/c1":           "/c1/c1",
		"/other/c12":       "/other/c12",
		"/xc1.scope/other": "/xc1.scope/other",
		"/":                "/",
		"":                 "",
	} {
		if got := containerGroup(path, "c1"); got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
}

func TestWaitFrozen(t *testing.T) {
	events := filepath.Join(t.TempDir(), "cgroup.events")
	write := func(s string) {
		if err := os.WriteFile(events, []byte(s), 0o600); err != nil {
			t.Error(err)
		}
	}
	write("populated 1\nfrozen 0\n")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := waitFrozen(ctx, events); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("not frozen yet: %v", err)
	}
	time.AfterFunc(10*time.Millisecond, func() { write("populated 1\nfrozen 1\n") })
	if err := waitFrozen(t.Context(), events); err != nil {
		t.Error(err)
	}
	if err := waitFrozen(t.Context(), events+"-gone"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("gone: %v", err)
	}
}

// TestLastOOM: an OOM kill that ends the container is reported, though the watch
// ends at the same time, and once.
func TestLastOOM(t *testing.T) {
	for range 50 { // select has no order
		r := &recorder{}
		w := &oomWatcher{publisher: &publisher{Publisher: r}}
		events, errs := make(chan cgroup2.Event, 1), make(chan error)
		events <- cgroup2.Event{OOMKill: 1}
		close(errs)
		w.watch2(t.Context(), "c", events, errs)
		if len(r.topics) != 1 {
			t.Fatalf("published %v, want one event", r.topics)
		}
	}
}
