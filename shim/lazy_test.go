package shim

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-containers/stasis/internal/testenv"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
	"github.com/stasis-containers/stasis/pkg/restore"
)

// TestMain is a holder where a test starts one.
func TestMain(m *testing.M) {
	if HoldMemory() {
		return
	}
	os.Exit(m.Run())
}

func TestEagerBecause(t *testing.T) {
	const id = "0123456789abcdef"
	spec := func(change func(*specs.Linux)) *specs.Spec {
		l := &specs.Linux{CgroupsPath: "/kubepods/pod1/" + id}
		change(l)
		return &specs.Spec{Linux: l}
	}
	limit := func(n int64) *specs.Spec {
		return spec(func(l *specs.Linux) { l.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &n}} })
	}
	namespaces := func(ns ...specs.LinuxNamespaceType) *specs.Spec {
		return spec(func(l *specs.Linux) {
			for _, n := range ns {
				l.Namespaces = append(l.Namespaces, specs.LinuxNamespace{Type: n})
			}
		})
	}
	group := func(path string) *specs.Spec { return spec(func(l *specs.Linux) { l.CgroupsPath = path }) }
	plain := group("kubepods.slice:cri-containerd:" + id)
	for _, tt := range []struct {
		name         string
		memory       checkpoint.Memory
		images, used int64 // MiB
		spec         *specs.Spec
		version      string
		want         string // part of the reason
	}{
		{"much", "lazy", 1 << 10, 1 << 10, plain, "4.2.1", ""},
		{"just enough", "lazy", 32, 32, namespaces(specs.PIDNamespace, specs.MountNamespace), "4.2", ""},
		{"little", "lazy", 31, 31, plain, "4.2.1", "little memory"},
		{"not wanted", "eager", 1 << 10, 1 << 10, plain, "4.2.1", checkpoint.AnnotationMemory},
		{"daemon does not say", "", 1 << 10, 1 << 10, plain, "4.2.1", checkpoint.AnnotationMemory},
		{"old CRIU", "lazy", 1 << 10, 1 << 10, plain, "4.1.1", `CRIU "4.1.1"`},
		{"no CRIU", "lazy", 1 << 10, 1 << 10, plain, "", `CRIU ""`},
		{"old checkpoint", "lazy", 1 << 10, 0, plain, "4.2.1", "how much memory"},
		{"shared after fork", "lazy", 1 << 10, 700, plain, "4.2.1", "since a fork: 1024 MiB of images were 700 MiB"},
		{"hardly shared", "lazy", 1 << 10, 900, plain, "4.2.1", ""},
		{"user namespace", "lazy", 1 << 10, 1 << 10, namespaces(specs.PIDNamespace, specs.UserNamespace), "4.2.1", "user namespace"},
		{"within the limit", "lazy", 800, 800, limit(900 << 20), "4.2.1", ""},
		{"near the limit", "lazy", 801, 801, limit(900 << 20), "4.2.1", "limit of 900 MiB is near to the 801 MiB"},
		{"no limit", "lazy", 1 << 10, 1 << 10, limit(-1), "4.2.1", ""},
		{"limit 0", "lazy", 1 << 10, 1 << 10, limit(0), "4.2.1", ""},
		{"cgroup of another name", "lazy", 1 << 10, 1 << 10, group("/kubepods/pod1/app"), "4.2.1", "cgroup"},
		{"no cgroup", "lazy", 1 << 10, 1 << 10, group(""), "4.2.1", "cgroup"},
		{"not for Linux", "lazy", 1 << 10, 1 << 10, &specs.Spec{}, "4.2.1", "cgroup"},
	} {
		c := newContainer(id)
		c.spec, c.settings.Memory = tt.spec, tt.memory
		m := &checkpoint.Manifest{
			Files: []checkpoint.File{{Path: "checkpoint/pages-1.img", SizeBytes: tt.images << 20}},
			Sizes: checkpoint.Sizes{InUseBytes: tt.used << 20},
		}
		if got := eagerBecause(m, c, tt.version); !strings.Contains(got, tt.want) || got != "" && tt.want == "" {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestInGroup(t *testing.T) {
	const id = "0123456789abcdef"
	for file, want := range map[string]bool{
		"0::/kubepods.slice/cri-containerd-" + id + ".scope\n":                      true,
		"0::/kubepods.slice/cri-containerd-" + id + ".scope/init.scope\n":           true,
		"5:freezer:/kubepods/pod1/" + id + "\n1:name=systemd:/other\n":              true,
		"5:freezer:/\n1:name=systemd:/kubepods/" + id + "\n":                        true,
		"5:freezer:/kubepods/pod1/" + id + "0\n":                                    false,
		"5:freezer:/kubepods/pod1\n0::/x\n":                                         false,
		"0::/kubepods.slice/cri-containerd-" + id + ".scope.d/x-" + id + ".slice\n": false,
		id: false,
		"": false,
	} {
		if got := inGroup(file, id); got != want {
			t.Errorf("%q: %v", file, got)
		}
	}
}

func TestRuns(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if !runs(cmd.Process.Pid) {
		t.Error("a process that sleeps does not run")
	}
	cmd.Process.Kill()
	for end := time.Now().Add(10 * time.Second); runs(cmd.Process.Pid); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a zombie runs")
		}
	}
	cmd.Wait()
	if runs(cmd.Process.Pid) {
		t.Error("a process that is gone runs")
	}
}

// TestWaitFull: what dumps waits until memory is full, and fails where it does
// not become so.
func TestWaitFull(t *testing.T) {
	c := newContainer("c")
	if err := c.waitFull(t.Context()); err != nil {
		t.Errorf("without a pager: %v", err)
	}
	l := &lazyRestore{done: make(chan struct{})}
	c.lazy = l
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := c.waitFull(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it is filled: %v", err)
	}
	l.err = errors.New("failed")
	close(l.done)
	if err := c.waitFull(t.Context()); !errors.Is(err, l.err) {
		t.Errorf("not filled: %v", err)
	}
}

// pendingLazy is [pending] with memory that a pager may fill.
func pendingLazy(t *testing.T) (*service, *restoringInner, *container, *store.Store) {
	t.Helper()
	testenv.Need(t, testenv.Root) // for a userfaultfd that sees faults of the kernel
	s, i, c, st := pending(t)
	c.id = "no-process-is-in-such-a-cgroup"
	p := c.restore
	images := filepath.Join(p.claim.Dir(), checkpoint.ImageDir)
	if err := os.CopyFS(images, os.DirFS("../pkg/checkpoint/criu/testdata/criu42")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pages-2.img", "pages-3.img"} {
		if err := os.WriteFile(filepath.Join(images, name), make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(c.bundle, "work"), 0o700); err != nil {
		t.Fatal(err)
	}
	p.plan = &restore.Plan{ImageDir: images}
	return s, i, c, st
}

func wantEvents(t *testing.T, s *service, want ...string) {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(s.config.Root, "events.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range want {
		if !strings.Contains(string(log), w) {
			t.Errorf("events %s, want %q", log, w)
		}
	}
}

// wantNoHolder fails unless the holders of this process's pagers end.
func wantNoHolder(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		var left []string
		names, _ := filepath.Glob("/proc/self/task/*/children")
		for _, name := range names {
			b, _ := os.ReadFile(name)
			for _, pid := range strings.Fields(string(b)) {
				if line, _ := os.ReadFile("/proc/" + pid + "/cmdline"); strings.HasPrefix(string(line), holderName) {
					left = append(left, pid)
				}
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("holders %v are left", left)
		}
	}
}

// TestEagerInstead: where a restore with a pager fails before a task has run,
// CRIU is asked to read the memory itself; where that fails too, or cannot even
// be tried, the container starts cold.
func TestEagerInstead(t *testing.T) {
	failed := func() error { return errors.New("criu failed: lazy-pages") }
	for _, tt := range []struct {
		name   string
		create func() error // outcome of the second create
		again  func() error // outcome of the second start
		calls  string
		state  store.State
		events []string
	}{
		{"restored", nil, nil, "start delete create start", "", []string{`"restored"`, "memory was read before the start: a restore with a pager failed: CRIU failed: criu failed: lazy-pages"}},
		{"refused", failed, nil, "start delete create create start", store.Quarantined, []string{`"cold-start"`, `"quarantined"`}},
		{"failed again", nil, failed, "start delete create start delete create start", store.Quarantined, []string{`"cold-start"`, `"quarantined"`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, i, c, st := pendingLazy(t)
			var config string
			i.start = func() error {
				b, _ := os.ReadFile(filepath.Join(c.bundle, criuConfigFile))
				config = string(b)
				i.start, i.create = tt.again, tt.create
				return failed()
			}
			s.containers[c.id] = c
			if _, err := s.Start(t.Context(), &taskAPI.StartRequest{ID: c.id}); err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(config, "lazy-pages") {
				t.Errorf("CRIU was not asked for a lazy restore: %q", config)
			}
			if got := strings.Join(i.calls, " "); got != tt.calls {
				t.Errorf("inner calls %q, want %q", got, tt.calls)
			}
			if got := stateOf(t, st); got != tt.state {
				t.Errorf("the checkpoint is %q, want %q", got, tt.state)
			}
			if b, err := os.ReadFile(filepath.Join(c.bundle, criuConfigFile)); err != nil || strings.Contains(string(b), "lazy") {
				t.Errorf("configuration of the next dump: %q, %v", b, err)
			}
			if !isClosed(c.settled) {
				t.Error("the exchange does not end")
			}
			if marks, _ := os.ReadDir(filepath.Join(s.config.RuntimeDir, "lazy")); len(marks) != 0 {
				t.Errorf("marks are left: %v", marks)
			}
			wantEvents(t, s, tt.events...)
			wantNoHolder(t)
		})
	}
}

// TestNoPager: where there can be no pager CRIU restores alone, and the event
// tells why.
func TestNoPager(t *testing.T) {
	s, i, c, st := pendingLazy(t)
	if err := os.Remove(filepath.Join(c.bundle, "work")); err != nil {
		t.Fatal(err)
	}
	s.containers[c.id] = c
	if _, err := s.Start(t.Context(), &taskAPI.StartRequest{ID: c.id}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(i.calls, " "); got != "start" {
		t.Errorf("inner calls %q", got)
	}
	if got := stateOf(t, st); got != "" {
		t.Errorf("the checkpoint is %q, want it consumed", got)
	}
	wantEvents(t, s, "memory was read before the start: work directory")
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

// TestOnceMore: a checkpoint whose container died with its shim while memory
// was filled is restored once more, without a pager, and then used up.
func TestOnceMore(t *testing.T) {
	s, _, c, st := pendingLazy(t)
	s.containers[c.id] = c
	mark := s.lazyMark(c.restore)
	if err := s.mark(c.restore); err != nil { // as that shim did
		t.Fatal(err)
	}
	if _, err := s.Start(t.Context(), &taskAPI.StartRequest{ID: c.id}); err != nil {
		t.Fatal(err)
	}
	if c.lazy != nil || exists(mark) {
		t.Error("filled by a pager, or marked")
	}
	if got := stateOf(t, st); got != "" {
		t.Errorf("the checkpoint is %q, want it consumed", got)
	}
	wantEvents(t, s, "died with its shim")
}

// TestPagerFails: a checkpoint stays claimed while memory is filled, and is set
// aside where that fails. Whoever deletes the container waits for it.
func TestPagerFails(t *testing.T) {
	s, _, c, st := pendingLazy(t)
	s.containers[c.id] = c
	if _, err := s.Start(t.Context(), &taskAPI.StartRequest{ID: c.id}); err != nil {
		t.Fatal(err)
	}
	if mark := s.lazyMark(c.lazy.from); !exists(mark) {
		t.Errorf("no %s", mark)
	} else {
		defer func() {
			if exists(mark) {
				t.Errorf("%s is left", mark)
			}
		}()
	}
	if got := stateOf(t, st); got != store.Claimed {
		t.Errorf("the checkpoint is %q while memory is filled, want it claimed", got)
	}
	if err := c.lazy.holder.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Delete(t.Context(), &taskAPI.DeleteRequest{ID: c.id}); err != nil {
		t.Fatal(err)
	}
	if got := stateOf(t, st); got != store.Quarantined {
		t.Errorf("the checkpoint is %q, want it quarantined", got)
	}
	if err := c.waitFull(t.Context()); !errors.Is(err, errHolder) {
		t.Errorf("dump: %v", err)
	}
	wantEvents(t, s, `"restored"`, `"restore-failed"`, `"pager"`, errHolder.Error(), `"quarantined"`)
	wantNoHolder(t)
}

// TestWatchStart: a start that goes on without its pager has its tasks killed, and one that
// ends has not.
func TestWatchStart(t *testing.T) {
	for _, ends := range []bool{false, true} {
		s, _, c, _ := pendingLazy(t)
		l := s.beginLazy(t.Context(), c, c.restore)
		if l == nil {
			t.Fatalf("no pager: %s", c.restore.eager)
		}
		killed := make(chan string, 1)
		stop := l.watchStart(t.Context(), func(_ context.Context, id string) error {
			killed <- id
			return nil
		})
		if err := l.holder.Kill(); err != nil {
			t.Fatal(err)
		}
		<-l.exited
		if ends {
			stop()
		}
		select {
		case id := <-killed:
			if ends || id != c.id {
				t.Errorf("%s is killed", id)
			}
		case <-time.After(failWait + 3*time.Second):
			if !ends {
				t.Error("it hangs")
			}
		}
		stop()
		if err := s.abandonLazy(t.Context(), c); err != nil {
			t.Error(err)
		}
		wantNoHolder(t)
	}
}

// TestStartEarly: a pager that was started in Create is the one that begins, unless
// it has waited for too long; and none is left where there is no start.
func TestStartEarly(t *testing.T) {
	for _, tt := range []struct {
		name string
		age  time.Duration
		same bool
	}{
		{"at once", 0, true},
		{"late", maxEarly + time.Second, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, _, c, _ := pendingLazy(t)
			p := c.restore
			s.startLazy(t.Context(), c, p)
			first := p.start
			first.at = first.at.Add(-tt.age)
			l := s.beginLazy(t.Context(), c, p)
			if l == nil {
				t.Fatalf("no pager: %s", p.eager)
			}
			if same := l == first.lazy; same != tt.same {
				t.Errorf("the same pager: %v", same)
			}
			if p.start != nil {
				t.Error("it could begin once more")
			}
			if err := s.abandonLazy(t.Context(), c); err != nil {
				t.Error(err)
			}
			wantNoHolder(t)
		})
	}
	t.Run("deleted", func(t *testing.T) {
		s, _, c, st := pendingLazy(t)
		s.startLazy(t.Context(), c, c.restore)
		s.containers[c.id] = c
		if _, err := s.Delete(t.Context(), &taskAPI.DeleteRequest{ID: c.id}); err != nil {
			t.Fatal(err)
		}
		if got := stateOf(t, st); got != store.Committed {
			t.Errorf("the checkpoint is %q, want it given back", got)
		}
		wantNoHolder(t)
	})
}
