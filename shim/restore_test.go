package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/stasis-containers/stasis/nri/eventlog"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
	"github.com/stasis-containers/stasis/pkg/restore"
)

// restoringInner is an inner service with a container that was created from a
// checkpoint.
type restoringInner struct {
	*inner
	start   func() error // outcome of the next Start, nil for success
	create  func() error // of the next Create, likewise
	running bool         // as runc sees it
}

func (i *restoringInner) Start(ctx context.Context, _ *taskAPI.StartRequest) (*taskAPI.StartResponse, error) {
	i.calls = append(i.calls, "start")
	if i.start != nil {
		start := i.start
		i.start = nil
		if err := start(); err != nil {
			return nil, err
		}
	}
	return &taskAPI.StartResponse{Pid: 7}, nil
}

func (i *restoringInner) Create(ctx context.Context, r *taskAPI.CreateTaskRequest) (*taskAPI.CreateTaskResponse, error) {
	resp, err := i.inner.Create(ctx, r)
	if create := i.create; create != nil {
		i.create = nil
		return nil, create()
	}
	return resp, err
}

func (i *restoringInner) Delete(ctx context.Context, _ *taskAPI.DeleteRequest) (*taskAPI.DeleteResponse, error) {
	i.calls = append(i.calls, "delete")
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if i.running {
		return nil, errors.New("cannot delete container that is not stopped")
	}
	return &taskAPI.DeleteResponse{}, nil
}

func (i *restoringInner) Kill(ctx context.Context, _ *taskAPI.KillRequest) (*emptypb.Empty, error) {
	i.calls = append(i.calls, "kill")
	i.running = false
	return empty, ctx.Err()
}

// pending makes a container that was created from a committed checkpoint.
func pending(t *testing.T) (*service, *restoringInner, *container, *store.Store) {
	t.Helper()
	s, in := testService(t)
	i := &restoringInner{inner: in}
	s.TTRPCTaskService = i
	s.config.Root = filepath.Join(t.TempDir(), "store")
	st, err := store.Open(fsys.OS{}, s.config.Root)
	if err != nil {
		t.Fatal(err)
	}
	identity := checkpoint.Identity{Namespace: "ns", Key: "key", Container: "app"}
	m := &checkpoint.Manifest{ID: checkpoint.NewID(identity, time.Now()), Identity: identity, CreatedAt: time.Now()}
	stage, err := st.Stage(t.Context(), m.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := stage.Commit(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	c := newContainer("c")
	c.bundle, c.upper, c.work = filepath.Join(filepath.Dir(s.config.Root), "bundle"), t.TempDir(), t.TempDir()
	c.optedIn, c.identity = true, identity
	c.request = &taskAPI.CreateTaskRequest{ID: "c", Bundle: c.bundle}
	p := &pendingRestore{begun: time.Now(), fresh: true, plan: &restore.Plan{}}
	if p.claim, err = st.Claim(t.Context(), m.ID, "c"); err != nil {
		t.Fatal(err)
	}
	p.images = filepath.Join(c.bundle, imagesDir)
	if err := os.MkdirAll(p.images, 0o700); err != nil {
		t.Fatal(err)
	}
	c.restore = p
	s.containers["c"] = c
	return s, i, c, st
}

// stateOf returns the only checkpoint's state, empty without one.
func stateOf(t *testing.T, st *store.Store) store.State {
	t.Helper()
	records, err := st.List(t.Context())
	if err != nil || len(records) > 1 {
		t.Fatalf("%v, %v", records, err)
	}
	for _, pattern := range []string{".stage-*", "../bundle/" + imagesDir} {
		if left, _ := filepath.Glob(filepath.Join(st.Root(), pattern)); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
	if len(records) == 0 {
		return ""
	}
	return records[0].State
}

// TestRestoredCallerGone: a caller that goes away while the restore succeeds
// deletes the container; the checkpoint is there for the next one.
func TestRestoredCallerGone(t *testing.T) {
	s, i, _, st := pending(t)
	ctx, cancel := context.WithCancel(t.Context())
	i.start = func() error { i.running = true; cancel(); return nil }
	go func() { i.wait <- &taskAPI.WaitResponse{ExitStatus: 137} }()
	if _, err := s.Start(ctx, &taskAPI.StartRequest{ID: "c"}); err == nil {
		t.Fatal("started")
	}
	if got := strings.Join(i.calls, " "); got != "start kill delete" {
		t.Errorf("inner calls %q", got)
	}
	if got := stateOf(t, st); got != store.Committed {
		t.Errorf("the checkpoint is %q, want it committed", got)
	}
	wantGivenUp(t, st)
}

// wantGivenUp checks that the log says of the only restore that it was given up.
func wantGivenUp(t *testing.T, st *store.Store) {
	t.Helper()
	var got []event.Event
	if err := eventlog.Read(st.Root(), func(e event.Event) { got = append(got, e) }); err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || !got[0].GivenUp() {
		t.Errorf("events %+v, want one start that was given up", got)
	}
}

// TestRestoreAbandoned: a restore that ends with its call leaves no container,
// and the checkpoint as good as it was.
func TestRestoreAbandoned(t *testing.T) {
	s, i, c, st := pending(t)
	if err := os.WriteFile(filepath.Join(c.upper, "made-by-runc"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	i.start = func() error { cancel(); return errors.New("signal: killed") }
	if _, err := s.Start(ctx, &taskAPI.StartRequest{ID: "c"}); err == nil {
		t.Fatal("started")
	}
	if got := strings.Join(i.calls, " "); got != "start delete" {
		t.Errorf("inner calls %q", got)
	}
	if got := stateOf(t, st); got != store.Committed {
		t.Errorf("the checkpoint is %q, want it committed", got)
	}
	if entries, _ := os.ReadDir(c.upper); len(entries) != 0 {
		t.Errorf("the writable layer holds %v", entries)
	}
	wantGivenUp(t, st)
}

// TestRestoreFailsLate: processes that ran when runc failed are gone before the
// container is started cold.
func TestRestoreFailsLate(t *testing.T) {
	s, i, _, st := pending(t)
	i.start = func() error { i.running = true; return errors.New("open stdin") }
	if _, err := s.Start(t.Context(), &taskAPI.StartRequest{ID: "c"}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(i.calls, " "); got != "start delete kill delete create start" {
		t.Errorf("inner calls %q", got)
	}
	if got := stateOf(t, st); got != store.Quarantined {
		t.Errorf("the checkpoint is %q, want it quarantined", got)
	}
}

// TestKillBeforeStart: SIGKILL for a container that was created from a
// checkpoint has an effect that a waiter sees, and the checkpoint stays.
func TestKillBeforeStart(t *testing.T) {
	s, i, c, st := pending(t)
	waited := make(chan error, 1)
	go func() {
		_, err := s.Wait(t.Context(), &taskAPI.WaitRequest{ID: "c"})
		waited <- err
	}()
	if _, err := s.Kill(t.Context(), &taskAPI.KillRequest{ID: "c", Signal: 9}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(i.calls, " "); got != "delete create kill" {
		t.Errorf("inner calls %q", got)
	}
	if got := stateOf(t, st); got != store.Committed {
		t.Errorf("the checkpoint is %q, want it committed", got)
	}
	i.wait <- &taskAPI.WaitResponse{ExitStatus: 137}
	if err := <-waited; err != nil {
		t.Error(err)
	}
	if c.takeRestore() != nil {
		t.Error("a later start would restore what was given back")
	}
}

// TestDeleteFails: the claim of a restore whose object could not be deleted ends
// with a Delete that can, or at once where a Delete was faster.
func TestDeleteFails(t *testing.T) {
	for name, first := range map[string]error{
		"busy":            errors.New("device or resource busy"),
		"deleted already": errgrpc.ToGRPC(fmt.Errorf("container not created: %w", errdefs.ErrNotFound)),
	} {
		t.Run(name, func(t *testing.T) {
			s, i, _, st := pending(t)
			stuck := &stuckInner{i, first}
			s.TTRPCTaskService = stuck
			i.start = func() error { return errors.New("criu failed") }
			if _, err := s.Start(t.Context(), &taskAPI.StartRequest{ID: "c"}); err == nil {
				t.Fatal("started")
			}
			if !errdefs.IsNotFound(errgrpc.ToNative(first)) {
				if got, _ := st.List(t.Context()); len(got) != 1 || got[0].State != store.Claimed {
					t.Fatalf("%v, want one that is claimed", got)
				}
				stuck.err = nil
				if _, err := s.Delete(t.Context(), &taskAPI.DeleteRequest{ID: "c"}); err != nil {
					t.Fatal(err)
				}
			}
			if got := stateOf(t, st); got != store.Committed {
				t.Errorf("the checkpoint is %q, want it committed", got)
			}
		})
	}
}

type stuckInner struct {
	*restoringInner
	err error
}

func (i *stuckInner) Delete(ctx context.Context, r *taskAPI.DeleteRequest) (*taskAPI.DeleteResponse, error) {
	if i.err != nil {
		return nil, i.err
	}
	return i.restoringInner.Delete(ctx, r)
}

// TestUndoFails: what cannot be undone fails the start, but holds no claim.
func TestUndoFails(t *testing.T) {
	s, i, c, st := pending(t)
	c.work = filepath.Join(c.work, "gone")
	i.start = func() error { return errors.New("criu failed") }
	if _, err := s.Start(t.Context(), &taskAPI.StartRequest{ID: "c"}); err == nil {
		t.Fatal("started on a file system in an unknown state")
	}
	if got := strings.Join(i.calls, " "); got != "start delete" {
		t.Errorf("inner calls %q", got)
	}
	if got := stateOf(t, st); got != store.Quarantined {
		t.Errorf("the checkpoint is %q, want it quarantined", got)
	}
}

// TestLateFacts: a restore waits until the daemon has written the host facts.
func TestLateFacts(t *testing.T) {
	s, _, _, _ := pending(t)
	s.config.FactsTimeout = time.Minute
	name := filepath.Join(s.config.RuntimeDir, hostFactsFile)
	if _, err := os.Stat(name); err == nil {
		t.Fatal("the facts are there already")
	}
	wrote := make(chan error, 1)
	time.AfterFunc(150*time.Millisecond, func() { wrote <- criu.WriteHostFacts(name, checkpoint.Host{BootID: thisBoot(t)}) })
	if _, err := s.hostFacts(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
}

func thisBoot(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// TestNotTheCheckpointsFault: where the node or the container is in the way the
// container is started cold, with what it has, and the checkpoint stays good.
func TestNotTheCheckpointsFault(t *testing.T) {
	facts := `{"bootID": "` + thisBoot(t) + `"}`
	for name, tc := range map[string]struct{ facts, reason string }{
		"facts of another boot": {`{"bootID": "other"}`, "host facts"},
		"damaged facts":         {`{`, "host facts"},
		"no facts":              {"", "host facts"},
		"writable layer in use": {facts, "writable layer is in use"},
	} {
		t.Run(name, func(t *testing.T) {
			s, i, c, st := pending(t)
			if err := errors.Join(c.restore.claim.Release(t.Context()), c.restore.removeImages()); err != nil {
				t.Fatal(err)
			}
			if tc.facts != "" {
				if err := os.WriteFile(filepath.Join(s.config.RuntimeDir, hostFactsFile), []byte(tc.facts), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			s.openStore = func() (*store.Store, error) { return st, nil }
			c.spec = &specs.Spec{}
			kept := filepath.Join(c.upper, "kept")
			if err := os.WriteFile(kept, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			resp, err := s.createRestored(t.Context(), c, string(c.restore.claim.ID()))
			if resp != nil || err != nil {
				t.Fatalf("%v, %v, want a cold start", resp, err)
			}
			if _, err := os.Stat(kept); err != nil {
				t.Error(err)
			}
			if got := stateOf(t, st); got != store.Committed {
				t.Errorf("the checkpoint is %q, want it committed", got)
			}
			if len(i.calls) != 0 {
				t.Errorf("inner calls %v", i.calls)
			}
			if log, err := os.ReadFile(filepath.Join(s.config.Root, "events.jsonl")); err != nil || !strings.Contains(string(log), tc.reason) {
				t.Errorf("events %s, %v, want one with %q", log, err, tc.reason)
			}
		})
	}
}

// TestCreateGivenUp: a caller that gives up on Create deletes what it asked for.
// If it does so while the container is still being made, the deletion comes
// after that; if not, nothing stays either.
func TestCreateGivenUp(t *testing.T) {
	for _, deletes := range []bool{true, false} {
		s, in := testService(t)
		i := &restoringInner{inner: in}
		s.TTRPCTaskService = i
		bundle := writeBundle(t, map[string]string{
			checkpoint.InternalPolicy: "resume", checkpoint.InternalKey: "key",
			checkpoint.CRISandboxNamespace: "ns", checkpoint.CRIContainerName: "app",
		})
		ctx, giveUp := context.WithCancel(t.Context())
		deleted := make(chan error, 1)
		in.spec = func(string) {
			if !deletes {
				giveUp()
				return
			}
			go func() {
				_, err := s.Delete(t.Context(), &taskAPI.DeleteRequest{ID: "c"})
				deleted <- err
			}()
			select {
			case err := <-deleted:
				t.Errorf("deleted while it is being made: %v", err)
				deleted <- err
			case <-time.After(50 * time.Millisecond):
			}
		}
		_, err := s.Create(ctx, &taskAPI.CreateTaskRequest{ID: "c", Bundle: bundle, Rootfs: []*types.Mount{{
			Type: "overlay", Options: []string{"upperdir=" + t.TempDir(), "workdir=" + t.TempDir()},
		}}})
		giveUp()
		if deletes {
			if derr := <-deleted; err != nil || derr != nil {
				t.Errorf("create: %v; delete: %v", err, derr)
			}
		} else if !errors.Is(errgrpc.ToNative(err), context.Canceled) {
			t.Errorf("create: %v", err)
		}
		want := "create delete"
		if deletes {
			want = "create state delete"
		}
		if got := strings.Join(in.calls, " "); got != want || s.lookup("c") != nil {
			t.Errorf("inner calls %q, left %v", got, s.lookup("c"))
		}
	}
}
