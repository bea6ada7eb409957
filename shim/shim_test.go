package shim

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// inner is the runc service as far as these tests need one: what the real one
// does is tested on real parts, in test/integration.
type inner struct {
	taskAPI.TTRPCTaskService
	calls []string
	wait  chan *taskAPI.WaitResponse
	spec  func(bundle string)
}

func (i *inner) Create(_ context.Context, r *taskAPI.CreateTaskRequest) (*taskAPI.CreateTaskResponse, error) {
	i.calls = append(i.calls, "create")
	if i.spec != nil {
		i.spec(r.Bundle)
	}
	return &taskAPI.CreateTaskResponse{Pid: 7}, nil
}

func (i *inner) Kill(_ context.Context, r *taskAPI.KillRequest) (*emptypb.Empty, error) {
	i.calls = append(i.calls, "kill")
	return empty, nil
}

func (i *inner) Exec(context.Context, *taskAPI.ExecProcessRequest) (*emptypb.Empty, error) {
	i.calls = append(i.calls, "exec")
	return empty, nil
}

func (i *inner) State(context.Context, *taskAPI.StateRequest) (*taskAPI.StateResponse, error) {
	i.calls = append(i.calls, "state")
	return &taskAPI.StateResponse{Pid: 7}, nil
}

func (i *inner) Wait(ctx context.Context, _ *taskAPI.WaitRequest) (*taskAPI.WaitResponse, error) {
	select {
	case r := <-i.wait:
		return r, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func testService(t *testing.T) (*service, *inner) {
	t.Helper()
	config := DefaultConfig()
	config.Root, config.RuntimeDir = t.TempDir(), t.TempDir()
	i := &inner{wait: make(chan *taskAPI.WaitResponse)}
	return newService(t.Context(), i, &publisher{}, config), i
}

func writeBundle(t *testing.T, annotations map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	b, err := json.Marshal(map[string]any{"ociVersion": "1.2.0", "futureField": 1, "annotations": annotations})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, specFile), b, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestPlainContainer: without annotations of ours every call is passed on and
// the bundle is not touched.
func TestPlainContainer(t *testing.T) {
	s, i := testService(t)
	bundle := writeBundle(t, map[string]string{"a": "b"})
	before, _ := os.ReadFile(filepath.Join(bundle, specFile))
	if _, err := s.Create(t.Context(), &taskAPI.CreateTaskRequest{ID: "c", Bundle: bundle}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Kill(t.Context(), &taskAPI.KillRequest{ID: "c", Signal: 15}); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(filepath.Join(bundle, specFile)); string(after) != string(before) {
		t.Errorf("the spec was changed: %s", after)
	}
	if got := strings.Join(i.calls, " "); got != "create kill" {
		t.Errorf("inner calls %q", got)
	}
	if entries, _ := os.ReadDir(s.config.Root); len(entries) != 0 {
		t.Errorf("the store was touched: %v", entries)
	}
}

// TestForeignCRIUConfig: a CRIU configuration file that is not ours never
// reaches runc, and unknown fields of the spec survive its removal.
func TestForeignCRIUConfig(t *testing.T) {
	s, i := testService(t)
	bundle := writeBundle(t, map[string]string{checkpoint.CRIUConfigAnnotation: "/tmp/evil", "keep": "me"})
	var seen string
	i.spec = func(bundle string) {
		b, _ := os.ReadFile(filepath.Join(bundle, specFile))
		seen = string(b)
	}
	if _, err := s.Create(t.Context(), &taskAPI.CreateTaskRequest{ID: "c", Bundle: bundle}); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(seen, "evil") || !strings.Contains(seen, "futureField") || !strings.Contains(seen, `"keep":"me"`) {
		t.Errorf("runc saw %s", seen)
	}
}

// TestBusy: while an operation holds the container State answers from the
// record and what needs the inner lock is refused with an error to try again.
func TestBusy(t *testing.T) {
	s, i := testService(t)
	if _, err := s.Create(t.Context(), &taskAPI.CreateTaskRequest{ID: "c", Bundle: writeBundle(t, nil)}); err != nil {
		t.Fatal(err)
	}
	c := s.lookup("c")
	if !c.begin("dump", &taskAPI.StateResponse{Pid: 42}) || c.begin("dump", nil) {
		t.Fatal("begin is not exclusive")
	}
	i.calls = nil
	st, err := s.State(t.Context(), &taskAPI.StateRequest{ID: "c"})
	if err != nil || st.Pid != 42 {
		t.Errorf("state %v, %v", st, err)
	}
	_, err = s.Exec(t.Context(), &taskAPI.ExecProcessRequest{ID: "c", ExecID: "e"})
	if !errdefs.IsUnavailable(errgrpc.ToNative(err)) {
		t.Errorf("exec: %v, want unavailable", err)
	}
	if len(i.calls) != 0 {
		t.Errorf("inner calls %v", i.calls)
	}
	c.end()
	if _, err := s.Exec(t.Context(), &taskAPI.ExecProcessRequest{ID: "c", ExecID: "e"}); err != nil {
		t.Errorf("exec after the end: %v", err)
	}
}

// TestWaitFollowsExchange: a waiter on the object of a failed restore gets the
// exit of the one that replaced it, and other calls wait for it.
func TestWaitFollowsExchange(t *testing.T) {
	s, i := testService(t)
	if _, err := s.Create(t.Context(), &taskAPI.CreateTaskRequest{ID: "c", Bundle: writeBundle(t, nil)}); err != nil {
		t.Fatal(err)
	}
	c := s.lookup("c")
	type answer struct {
		r   *taskAPI.WaitResponse
		err error
	}
	got := make(chan answer, 1)
	go func() {
		r, err := s.Wait(t.Context(), &taskAPI.WaitRequest{ID: "c"})
		got <- answer{r, err}
	}()
	end := c.beginExchange()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.State(ctx, &taskAPI.StateRequest{ID: "c"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("state during the exchange: %v", err)
	}
	select {
	case a := <-got:
		t.Fatalf("the waiter returned during the exchange: %v", a)
	default:
	}
	end()
	i.wait <- &taskAPI.WaitResponse{ExitStatus: 9}
	if a := <-got; a.err != nil || a.r.ExitStatus != 9 {
		t.Errorf("wait: %v", a)
	}
}

// TestStopWaitsForCheckpoint: a stop of an opted-in container that is being
// checkpointed by the CRI call waits, so that it is dumped and not just killed.
func TestStopWaitsForCheckpoint(t *testing.T) {
	s, i := testService(t)
	c := newContainer("c")
	c.optedIn = true
	s.containers["c"] = c
	c.begin(opCheckpoint, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Kill(ctx, &taskAPI.KillRequest{ID: "c", Signal: 15}); !errors.Is(err, context.DeadlineExceeded) || len(i.calls) != 0 {
		t.Errorf("during the checkpoint: %v, inner calls %v", err, i.calls)
	}
	c.end()
	c.begin(opDump, nil) // a second stop must not wait for the first
	if _, err := s.Kill(t.Context(), &taskAPI.KillRequest{ID: "c", Signal: 15}); err != nil {
		t.Errorf("after it: %v", err)
	}
}

type recorder struct{ topics []string }

func (r *recorder) Publish(_ context.Context, topic string, _ events.Event) error {
	r.topics = append(r.topics, topic)
	return nil
}
func (r *recorder) Close() error { return nil }

func TestMutedDelete(t *testing.T) {
	r := &recorder{}
	p := &publisher{Publisher: r}
	p.muteDelete("a")
	for _, id := range []string{"a", "b", "a"} {
		if err := p.Publish(t.Context(), id, &apievents.TaskDelete{ContainerID: id}); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(r.topics, " "); got != "b a" {
		t.Errorf("published %q, want the first of a dropped", got)
	}
}

func TestSlots(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	first, err := acquireSlot(t.Context(), dir, 1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := acquireSlot(ctx, dir, 1); !errors.Is(err, checkpoint.ErrBusy) {
		t.Errorf("second slot of one: %v, want ErrBusy", err)
	}
	first()
	again, err := acquireSlot(t.Context(), dir, 1)
	if err != nil {
		t.Fatalf("after release: %v", err)
	}
	again()
}

func TestOverlayDirs(t *testing.T) {
	overlay := func(options ...string) []*types.Mount { return []*types.Mount{{Type: "overlay", Options: options}} }
	for _, tc := range []struct {
		name   string
		mounts []*types.Mount
		ok     bool
	}{
		{"overlay", overlay("index=off", "workdir=/s/work", "upperdir=/s/fs", "lowerdir=/l"), true},
		{"read-only overlay", overlay("lowerdir=/a:/b"), false},
		{"relative", overlay("workdir=w", "upperdir=u"), false},
		{"bind", []*types.Mount{{Type: "bind", Source: "/x"}}, false},
		{"none", nil, false},
	} {
		upper, work, err := overlayDirs(tc.mounts)
		if (err == nil) != tc.ok || tc.ok && (upper != "/s/fs" || work != "/s/work") {
			t.Errorf("%s: %q %q %v", tc.name, upper, work, err)
		}
		if err != nil && !errors.Is(err, checkpoint.ErrUnsupported) {
			t.Errorf("%s: %v is not ErrUnsupported", tc.name, err)
		}
	}
}

// TestStoreRepaired: a store that could not be opened once is tried again.
func TestStoreRepaired(t *testing.T) {
	s, _ := testService(t)
	if err := os.Chmod(s.config.Root, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := s.openStore(); err == nil {
		t.Fatal("opened a store that others may read")
	}
	if err := os.Chmod(s.config.Root, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := s.openStore(); err != nil {
		t.Error(err)
	}
}

func TestReadOnly(t *testing.T) {
	for options, want := range map[string]bool{"rbind ro": true, "rbind rprivate rro": true, "rbind rw": false, "": false, "nosuid,ro": false} {
		if got := readOnly(strings.Fields(options)); got != want {
			t.Errorf("%q: %v", options, got)
		}
	}
}

func TestSettingsRefused(t *testing.T) {
	for _, a := range []map[string]string{
		{checkpoint.InternalPolicy: "resume", checkpoint.InternalKey: "../x"},
		{checkpoint.InternalPolicy: "sometimes"},
		{checkpoint.InternalPolicy: "resume", checkpoint.InternalTCP: "maybe"},
		{checkpoint.InternalPolicy: "resume", checkpoint.InternalMemory: "maybe"},
		{checkpoint.InternalPolicy: "template", checkpoint.InternalTemplate: "shop", checkpoint.InternalMerge: "maybe"},
		{checkpoint.InternalPolicy: "resume", checkpoint.InternalAfterRestore: "signal SIGKILL"},
	} {
		if s, err := settingsOf(a); err == nil || s.OptedIn() {
			t.Errorf("%v: %+v, %v", a, s, err)
		}
	}
}
