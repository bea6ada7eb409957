package reboot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// testNode is a node with real sockets and a real store; its shims and its
// kubelet do as they are told.
type testNode struct {
	Node
	t       *testing.T
	store   *store.Store
	kubelet *testKubelet
	shims   map[string]*testShim
}

func newTestNode(t *testing.T) *testNode {
	t.Helper()
	dir, err := os.MkdirTemp("", "rb") // a socket's name must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	st, err := store.Open(fsys.OS{}, filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	n := &testNode{t: t, store: st, kubelet: &testKubelet{}, shims: map[string]*testShim{}}
	n.Node = Node{Root: st.Root(), ContainerdState: filepath.Join(dir, "state"), Kubelet: n.kubelet}
	if err := os.MkdirAll(filepath.Join(n.ContainerdState, tasksDir, "k8s.io"), 0o700); err != nil {
		t.Fatal(err)
	}
	return n
}

type testKubelet struct {
	running  bool
	stopErr  error
	askErr   error
	sleeping bool // Stop has no effect
	log      []string
}

func (k *testKubelet) Unit() string { return "kubelet.service" }
func (k *testKubelet) Running(context.Context) (string, error) {
	if k.running {
		return "kubelet.service is active", k.askErr
	}
	return "", k.askErr
}
func (k *testKubelet) Stop(context.Context) error {
	k.log = append(k.log, "stop")
	k.running = k.sleeping
	return k.stopErr
}
func (k *testKubelet) Start(context.Context) error {
	k.log = append(k.log, "start")
	k.running = true
	return nil
}

// testShim is the control service of one container, as package shim has it.
type testShim struct {
	control.Server // what it does not mention is not called
	n              *testNode
	key            string

	memory     int64
	prepareErr error         // of Prepare
	abortErr   error         // of Abort
	killErr    error         // of the task service's Kill
	hang       chan struct{} // if not nil, Prepare answers only when it is closed
	old        bool          // without the service

	mu     sync.Mutex
	state  control.State
	id     checkpoint.ID
	log    []string
	result control.Result
}

func (s *testShim) note(ctx context.Context, what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ns, _ := namespaces.Namespace(ctx)
	s.log = append(s.log, ns+" "+what)
}

func (s *testShim) Status(ctx context.Context, id string) (control.Status, error) {
	if id != "ctr-"+s.key {
		return control.Status{}, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return control.Status{State: s.state, Identity: identity(s.key), MemoryBytes: s.memory, CheckpointID: s.id, PID: 1}, nil
}

func (s *testShim) Prepare(ctx context.Context, id string) (control.Result, error) {
	s.note(ctx, "prepare")
	s.n.waitAll() // all are asked before any is done
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == control.Prepared {
		r := s.result
		r.Already = true
		return r, nil
	}
	if s.prepareErr != nil {
		return control.Result{}, s.prepareErr
	}
	s.state, s.id = control.Prepared, s.n.record(s.key)
	s.result = control.Result{CheckpointID: s.id, SizeBytes: 1 << 20, Duration: time.Second}
	if s.hang != nil { // done, but the answer does not get through
		s.mu.Unlock()
		<-s.hang
		s.mu.Lock()
	}
	return s.result, nil
}

// waitPrepared waits until the shim is done, whether its answer gets through or not.
func (s *testShim) waitPrepared() {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		s.mu.Lock()
		state := s.state
		s.mu.Unlock()
		if state == control.Prepared {
			return
		}
	}
	s.n.t.Errorf("%s is not prepared", s.key)
}

func (s *testShim) Abort(ctx context.Context, id string) error {
	s.note(ctx, "abort")
	if _, err := Load(fsys.OS{}, s.n.Root); !errors.Is(err, fs.ErrNotExist) {
		s.n.t.Errorf("the manifest is still there when %s goes on: %v", s.key, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.abortErr != nil {
		return s.abortErr
	}
	if s.state == control.Prepared {
		if err := s.n.store.Remove(ctx, s.id); err != nil {
			return err
		}
		s.state, s.id = control.Running, ""
	}
	return nil
}

// testTask is the task service of the same shim.
type testTask struct {
	taskAPI.TTRPCTaskService // what it does not mention is not called
	shim                     *testShim
}

func (k testTask) Kill(ctx context.Context, r *taskAPI.KillRequest) (*emptypb.Empty, error) {
	s := k.shim
	s.note(ctx, fmt.Sprintf("kill %s %d", r.ID, r.Signal))
	if m, err := Load(fsys.OS{}, s.n.Root); err != nil || len(m.Containers) == 0 {
		s.n.t.Errorf("killed before the manifest is there: %v", err)
	}
	if s.killErr != nil {
		return nil, errgrpc.ToGRPC(s.killErr)
	}
	return &emptypb.Empty{}, nil
}

// waitAll holds a Prepare until every shim that can has got its own.
func (n *testNode) waitAll() {
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		missing := 0
		for _, s := range n.shims {
			s.mu.Lock()
			if !s.old && s.state != control.Stopped && !slices.Contains(s.log, "k8s.io prepare") {
				missing++
			}
			s.mu.Unlock()
		}
		if missing == 0 {
			return
		}
		if time.Now().After(end) {
			n.t.Errorf("%d shims were not asked to prepare while the others waited", missing)
			return
		}
	}
}

// record commits a checkpoint of the key.
func (n *testNode) record(key string) checkpoint.ID {
	m := &checkpoint.Manifest{FormatVersion: checkpoint.FormatVersion, ID: checkpoint.NewID(identity(key), time.Now()), Identity: identity(key),
		CreatedAt: time.Now(), ImageDigest: "sha256:aa", Sizes: checkpoint.Sizes{TotalBytes: 1 << 20}}
	stage, err := n.store.Stage(context.Background(), m.ID)
	if err == nil {
		err = stage.Commit(context.Background(), m)
	}
	if err != nil {
		n.t.Error(err)
	}
	return m.ID
}

func (n *testNode) write(path, content string) {
	n.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

func (n *testNode) bundle(key string) string {
	return filepath.Join(n.ContainerdState, tasksDir, "k8s.io", "ctr-"+key)
}

func spec(key string) string {
	b, err := json.Marshal(map[string]any{"ociVersion": "1.2.0", "annotations": map[string]string{
		checkpoint.InternalPolicy: "reboot", checkpoint.InternalKey: key, checkpoint.CRISandboxNamespace: "default",
		checkpoint.CRISandboxName: "pod-" + key, checkpoint.CRISandboxUID: "uid-" + key, checkpoint.CRIContainerName: "c",
	}})
	if err != nil {
		panic(err)
	}
	return string(b)
}

// add makes a bundle, and a shim that serves its socket.
func (n *testNode) add(key string, with func(*testShim)) *testShim {
	n.t.Helper()
	s := &testShim{n: n, key: key, state: control.Running, memory: 1 << 20}
	if with != nil {
		with(s)
	}
	socket := filepath.Join(filepath.Dir(n.Root), key+".sock")
	n.write(filepath.Join(n.bundle(key), "config.json"), spec(key))
	n.write(filepath.Join(n.bundle(key), "bootstrap.json"), `{"version":3,"address":"unix://`+socket+`","protocol":"ttrpc"}`)
	l, err := net.Listen("unix", socket)
	if err != nil {
		n.t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		n.t.Fatal(err)
	}
	if !s.old {
		control.Register(server, s)
	}
	taskAPI.RegisterTTRPCTaskService(server, testTask{shim: s})
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(context.Background(), l) }() // its error is that it was closed
	n.t.Cleanup(func() { server.Close(); <-done })
	n.shims[key] = s
	return s
}

func (n *testNode) options() Options {
	return Options{Timeout: 20 * time.Second, Progress: func(done, total int, e Entry) {}}
}

// summary is "key:result" of all containers.
func summary(es []Entry) string {
	var all []string
	for _, e := range es {
		all = append(all, strings.TrimPrefix(e.ContainerID, "ctr-")+":"+string(e.Result))
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

func reason(m *Manifest, key string) string {
	for _, e := range m.Containers {
		if e.ContainerID == "ctr-"+key {
			return e.Reason
		}
	}
	return "no such container"
}

// TestKill: what is dumped is killed when the manifest is there, and nothing else.
func TestKill(t *testing.T) {
	n := newTestNode(t)
	n.add("a", nil)
	n.add("b", func(s *testShim) { s.prepareErr = errors.New("no") })
	n.add("c", func(s *testShim) { s.killErr = fmt.Errorf("it is dead: %w", errdefs.ErrNotFound) })
	o := n.options()
	o.Kill = true
	m, err := n.Prepare(t.Context(), o)
	if err != nil || summary(m.Containers) != "a:dumped b:failed c:dumped" {
		t.Fatalf("%v, %v", m, err)
	}
	for key, want := range map[string]string{"a": "k8s.io prepare, k8s.io kill ctr-a 9", "b": "k8s.io prepare", "c": "k8s.io prepare, k8s.io kill ctr-c 9"} {
		if got := strings.Join(n.shims[key].log, ", "); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
	n.shims["c"].killErr = errors.New("stuck")
	if m, err := n.Prepare(t.Context(), o); m == nil || err == nil || !strings.Contains(err.Error(), "stuck") {
		t.Errorf("%v, %v", m, err)
	}
}

func TestPrepare(t *testing.T) {
	n := newTestNode(t)
	n.add("a", nil)
	n.add("b", func(s *testShim) { s.prepareErr = fmt.Errorf("io_uring: %w", checkpoint.ErrUnsupported) })
	n.add("old", func(s *testShim) { s.old = true })
	n.add("dead", func(s *testShim) { s.state = control.Stopped })
	// Not opted in, no container at all, and one that cannot be judged.
	n.write(filepath.Join(n.bundle("plain"), "config.json"), `{"annotations":{"stasis.dev/policy":"reboot"}}`)
	n.write(filepath.Join(n.bundle("empty"), "other"), "")
	n.write(filepath.Join(n.bundle("bad"), "config.json"), `{`)
	n.write(filepath.Join(n.bundle("gone"), "config.json"), spec("gone"))
	n.write(filepath.Join(n.bundle("gone"), "bootstrap.json"), `{"version":3,"address":"unix:///nowhere/s","protocol":"ttrpc"}`)
	var told []string
	o := n.options()
	o.Progress = func(done, total int, e Entry) { told = append(told, fmt.Sprintf("%d/%d", done, total)) }
	m, err := n.Prepare(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := summary(m.Containers), "a:dumped b:failed bad:failed gone:failed old:failed"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if strings.Join(told, " ") != "1/5 2/5 3/5 4/5 5/5" {
		t.Errorf("progress %v", told)
	}
	for key, part := range map[string]string{"b": "io_uring", "old": "older release", "bad": "config.json", "gone": "connect to the shim"} {
		if !strings.Contains(reason(m, key), part) {
			t.Errorf("reason of %s: %q, want %q", key, reason(m, key), part)
		}
	}
	if boot, err := checkpoint.BootID(); err != nil || m.BootID != boot || m.KernelRelease == "" || m.Complete() {
		t.Errorf("manifest %+v, %v", m, err)
	}
	saved, err := Load(fsys.OS{}, n.Root)
	if err != nil || summary(saved.Containers) != summary(m.Containers) {
		t.Fatalf("saved %+v, %v", saved, err)
	}
	e := saved.Containers[slices.IndexFunc(saved.Containers, func(e Entry) bool { return e.Result == Dumped })]
	if e.Identity != identity("a") || e.PodName != "pod-a" || e.PodUID != "uid-a" || e.SizeBytes != 1<<20 || e.Duration != time.Second || e.CheckpointID != n.shims["a"].id {
		t.Errorf("entry %+v", e)
	}

	// The second run completes what is missing; who died meanwhile is kept as
	// long as its checkpoint is there.
	n.shims["b"].prepareErr = nil
	for _, key := range []string{"bad", "gone", "old"} {
		if err := os.RemoveAll(n.bundle(key)); err != nil {
			t.Fatal(err)
		}
	}
	if m, err = n.Prepare(t.Context(), n.options()); err != nil || summary(m.Containers) != "a:dumped b:dumped" || !m.Complete() {
		t.Errorf("again: %v, %v", m, err)
	}
	if err := os.RemoveAll(n.bundle("a")); err != nil {
		t.Fatal(err)
	}
	delete(n.shims, "a")
	if m, err = n.Prepare(t.Context(), n.options()); err != nil || summary(m.Containers) != "a:dumped b:dumped" {
		t.Errorf("a died while it was frozen: %v, %v", m, err)
	}
	if err := n.store.Remove(t.Context(), e.CheckpointID); err != nil {
		t.Fatal(err)
	}
	if m, err = n.Prepare(t.Context(), n.options()); err != nil || summary(m.Containers) != "b:dumped" {
		t.Errorf("and its checkpoint was used: %v, %v", m, err)
	}
}

func TestKubelet(t *testing.T) {
	for name, tc := range map[string]struct {
		kubelet testKubelet
		mode    KubeletMode
		wantErr string
		wantLog string
		unit    string // in the manifest
	}{
		"none":                {testKubelet{}, RefuseKubelet, "", "", ""},
		"refuse":              {testKubelet{running: true}, RefuseKubelet, "is active", "", ""},
		"ignore":              {testKubelet{running: true, askErr: errors.New("never asked")}, IgnoreKubelet, "", "", ""},
		"stop":                {testKubelet{running: true}, StopKubelet, "", "stop", "kubelet.service"},
		"stop none":           {testKubelet{}, StopKubelet, "", "", ""},
		"cannot tell":         {testKubelet{askErr: errors.New("no bus")}, StopKubelet, "no bus", "", ""},
		"cannot stop":         {testKubelet{running: true, stopErr: errors.New("denied")}, StopKubelet, "denied", "stop start", ""},
		"does not stop":       {testKubelet{running: true, sleeping: true}, StopKubelet, "is active", "stop start", ""},
		"cannot tell: refuse": {testKubelet{askErr: errors.New("no bus")}, RefuseKubelet, "cannot be told: no bus", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			n := newTestNode(t)
			*n.kubelet = tc.kubelet
			a := n.add("a", nil)
			o := n.options()
			o.Kubelet = tc.mode
			m, err := n.Prepare(t.Context(), o)
			if got := strings.Join(n.kubelet.log, " "); got != tc.wantLog {
				t.Errorf("kubelet: %q, want %q", got, tc.wantLog)
			}
			if tc.wantErr != "" {
				if !errors.Is(err, ErrKubelet) || !strings.Contains(err.Error(), tc.wantErr) || m != nil || len(a.log) > 0 {
					t.Errorf("manifest %v, error %v, shim %v", m, err, a.log)
				}
				return
			}
			if err != nil || summary(m.Containers) != "a:dumped" || m.StoppedKubelet != tc.unit {
				t.Fatalf("manifest %+v, error %v", m, err)
			}
			// A second preparation must not forget who was stopped.
			if m, err = n.Prepare(t.Context(), o); err != nil || m.StoppedKubelet != tc.unit {
				t.Errorf("again: %+v, %v", m, err)
			}
			aborted, err := n.Abort(t.Context())
			if err != nil || !aborted.Manifest || aborted.StartedKubelet != tc.unit || n.kubelet.running != (tc.unit != "" || tc.kubelet.running) {
				t.Errorf("abort: %+v, %v, kubelet runs: %v", aborted, err, n.kubelet.running)
			}
		})
	}
}

func TestAbort(t *testing.T) {
	n := newTestNode(t)
	a, b := n.add("a", nil), n.add("b", func(s *testShim) { s.abortErr = errors.New("cannot thaw") })
	n.add("old", func(s *testShim) { s.old = true })
	n.kubelet.running = true
	o := n.options()
	o.Kubelet = StopKubelet
	if _, err := n.Prepare(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	r, err := n.Abort(t.Context())
	if err == nil || !strings.Contains(err.Error(), "default/b/c: cannot thaw") || summary(r.Containers) != "a: b:failed old:" {
		t.Errorf("%+v, %v", r, err)
	}
	if !n.kubelet.running || a.state != control.Running || b.state != control.Prepared {
		t.Errorf("kubelet runs: %v, a %s, b %s", n.kubelet.running, a.state, b.state)
	}
	// Once more, for what is missing. The manifest is gone, who it had stopped
	// is not started twice.
	b.abortErr = nil
	if r, err = n.Abort(t.Context()); err != nil || r.Manifest || r.StartedKubelet != "" || b.state != control.Running {
		t.Errorf("again: %+v, %v, b %s", r, err, b.state)
	}
	if records, err := n.store.List(t.Context()); err != nil || len(records) != 0 {
		t.Errorf("records %v, %v", records, err)
	}
}

// TestAbortWithOtherManifests: one that cannot be read goes, that of the last
// reboot stays.
func TestAbortWithOtherManifests(t *testing.T) {
	n := newTestNode(t)
	a := n.add("a", nil)
	if err := os.WriteFile(filepath.Join(n.Root, FileName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r, err := n.Abort(t.Context()); err != nil || r.Manifest || len(a.log) != 1 {
		t.Errorf("%+v, %v, %v", r, err, a.log)
	}
	other := newTestNode(t)
	if err := save(fsys.OS{}, other.Root, testManifest(dumpedEntry("x"))); err != nil {
		t.Fatal(err)
	}
	if r, err := other.Abort(t.Context()); err != nil || r.Manifest {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := Load(fsys.OS{}, other.Root); err != nil {
		t.Errorf("the report of the last reboot: %v", err)
	}
}

func TestNoSpace(t *testing.T) {
	n := newTestNode(t)
	a := n.add("a", func(s *testShim) { s.memory = 1 << 60 })
	n.kubelet.running = true
	o := n.options()
	o.Kubelet = StopKubelet
	if m, err := n.Prepare(t.Context(), o); !errors.Is(err, checkpoint.ErrNoSpace) || m != nil || len(a.log) > 0 || len(n.kubelet.log) > 0 {
		t.Errorf("%v, %v; shim %v, kubelet %v", m, err, a.log, n.kubelet.log)
	}
	o.BestEffort = true
	if m, err := n.Prepare(t.Context(), o); err != nil || summary(m.Containers) != "a:dumped" {
		t.Errorf("best effort: %v, %v", m, err)
	}
	// What is dumped needs no room any more.
	o.BestEffort = false
	if m, err := n.Prepare(t.Context(), o); err != nil || summary(m.Containers) != "a:dumped" {
		t.Errorf("again: %v, %v", m, err)
	}
}

// TestInterrupted: the manifest says what is dumped, also where the shim's
// answer was not waited for.
func TestInterrupted(t *testing.T) {
	for name, timeout := range map[string]bool{"by the caller": false, "by the timeout": true} {
		t.Run(name, func(t *testing.T) {
			n := newTestNode(t)
			hang := make(chan struct{})
			defer close(hang)
			n.add("quick", nil)
			late := n.add("late", func(s *testShim) { s.hang = hang })
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			o := n.options()
			o.Progress = func(done, _ int, e Entry) {
				if done == 1 && !timeout {
					late.waitPrepared()
					cancel()
				}
			}
			if timeout {
				o.Timeout = 500 * time.Millisecond
			}
			m, err := n.Prepare(ctx, o)
			if (err == nil) != timeout || m == nil || summary(m.Containers) != "late:dumped quick:dumped" {
				t.Errorf("%+v, %v", m, err)
			}
			if saved, err := Load(fsys.OS{}, n.Root); err != nil || summary(saved.Containers) != summary(m.Containers) {
				t.Errorf("saved %+v, %v", saved, err)
			}
			if n.kubelet.log != nil {
				t.Error("the kubelet was touched")
			}
		})
	}
	t.Run("before anything is frozen", func(t *testing.T) {
		n := newTestNode(t)
		a := n.add("a", nil)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if m, err := n.Prepare(ctx, n.options()); err == nil || m != nil || len(a.log) > 0 {
			t.Errorf("%v, %v, %v", m, err, a.log)
		}
	})
}

// TestOneAtATime: a preparation waits for another one.
func TestOneAtATime(t *testing.T) {
	n := newTestNode(t)
	a := n.add("a", nil)
	lock, err := n.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	o := n.options()
	o.Timeout = 100 * time.Millisecond
	if _, err := n.Prepare(t.Context(), o); err == nil || !strings.Contains(err.Error(), "in progress") || len(a.log) > 0 {
		t.Errorf("error %v, shim %v", err, a.log)
	}
	lock.Close()
	if _, err := n.Prepare(t.Context(), n.options()); err != nil {
		t.Error(err)
	}
}

// TestHostileBundles: only a unix socket is dialled, and no file is followed,
// waited for, or read without bound.
func TestHostileBundles(t *testing.T) {
	n := newTestNode(t)
	for name, bootstrap := range map[string]string{
		"relative": `{"version":3,"address":"unix://s","protocol":"ttrpc"}`,
		"dots":     `{"version":3,"address":"unix:///run/../s","protocol":"ttrpc"}`,
		"tcp":      `{"version":3,"address":"tcp://127.0.0.1:1","protocol":"ttrpc"}`,
		"vsock":    `{"version":3,"address":"vsock://3:1","protocol":"ttrpc"}`,
		"abstract": `{"version":3,"address":"unix://\u0000/run/s","protocol":"ttrpc"}`,
		"nul":      `{"version":3,"address":"unix:///run/s\u0000x","protocol":"ttrpc"}`,
		"bare":     `{"version":3,"address":"/run/s","protocol":"ttrpc"}`,
		"grpc":     `{"version":3,"address":"unix:///run/s","protocol":"grpc"}`,
		"no json":  `unix:///run/s`,
		"large":    `{"x":"` + strings.Repeat("x", maxBootstrapBytes) + `"}`,
	} {
		n.write(filepath.Join(n.bundle(name), "bootstrap.json"), bootstrap)
		c := Container{Namespace: "k8s.io", ID: name, Bundle: n.bundle(name)}
		if path, err := c.socket(); err == nil {
			t.Errorf("%s: socket %q", name, path)
		}
		if err := os.RemoveAll(n.bundle(name)); err != nil {
			t.Fatal(err)
		}
	}
	n.write(filepath.Join(n.bundle("large"), "config.json"), `{"x":"`+strings.Repeat("x", maxSpecBytes)+`"}`)
	if err := os.MkdirAll(n.bundle("link"), 0o700); err != nil {
		t.Fatal(err)
	}
	n.write(filepath.Join(n.Root, "elsewhere"), spec("link"))
	if err := os.Symlink(filepath.Join(n.Root, "elsewhere"), filepath.Join(n.bundle("link"), "config.json")); err != nil {
		t.Fatal(err)
	}
	n.write(filepath.Join(n.bundle("slash"), "config.json"), strings.Replace(spec("k"), `"c"`, `"c/../d"`, 1))
	found, err := Find(t.Context(), n.ContainerdState)
	if err != nil || len(found) != 3 {
		t.Fatalf("%+v, %v", found, err)
	}
	for _, c := range found {
		if c.Err == nil || c.Identity != (checkpoint.Identity{}) {
			t.Errorf("%+v", c)
		}
	}
	if _, err := Find(t.Context(), filepath.Join(n.ContainerdState, "nowhere")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no containerd: %v", err)
	}
}

func TestKubeletProcess(t *testing.T) {
	proc := t.TempDir()
	put := func(pid, comm, ns string) {
		if err := os.MkdirAll(filepath.Join(proc, pid, "ns"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, pid, "comm"), []byte(comm+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("pid:["+ns+"]", filepath.Join(proc, pid, "ns/pid")); err != nil {
			t.Fatal(err)
		}
	}
	put("self", "stasis", "1")
	put("7", "kubelet-x", "1")
	put("8", "kubelet", "2") // of a node in a container
	put("sys", "kubelet", "1")
	k := &hostKubelet{unit: "kubelet.service", proc: proc}
	if what, err := k.process(); what != "" || err != nil {
		t.Errorf("%q, %v", what, err)
	}
	put("9", "kubelet", "1")
	if what, err := k.process(); !strings.Contains(what, "process 9") || err != nil {
		t.Errorf("%q, %v", what, err)
	}
}
