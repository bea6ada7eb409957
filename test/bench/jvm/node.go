package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/nri/eventlog"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

const (
	namespace = "bench"
	storeRoot = "/var/lib/stasis"
	// stepTimeout bounds each step, also of a slow machine.
	stepTimeout = 5 * time.Minute
)

// node is the CRI of the test node, asked as crictl asks it, but without the
// start of a crictl for each call.
type node struct {
	conn *grpc.ClientConn
	rt   cri.RuntimeServiceClient
	im   cri.ImageServiceClient
	pods int
}

func connect() (*node, error) {
	conn, err := grpc.NewClient("unix:///run/containerd/containerd.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &node{conn: conn, rt: cri.NewRuntimeServiceClient(conn), im: cri.NewImageServiceClient(conn)}, nil
}

func reference(image string) string { return "127.0.0.1:5000/" + image + ":latest" }

func (n *node) pull(ctx context.Context, image string) error {
	_, err := n.im.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: reference(image)}})
	return err
}

// pod is a sandbox with an address.
type pod struct {
	n       *node
	id      string
	address string // where its service listens
	config  *cri.PodSandboxConfig
}

func (n *node) pod(ctx context.Context, name string, annotations map[string]string) (*pod, error) {
	n.pods++
	p := &pod{n: n, config: &cri.PodSandboxConfig{
		Metadata:    &cri.PodSandboxMetadata{Name: name, Uid: fmt.Sprintf("%s-%d", name, n.pods), Namespace: namespace},
		Hostname:    name,
		Annotations: annotations,
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}}
	r, err := n.rt.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p.config, RuntimeHandler: "stasis"})
	if err != nil {
		return nil, err
	}
	p.id = r.PodSandboxId
	st, err := n.rt.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	if ip := st.GetStatus().GetNetwork().GetIp(); err == nil && ip == "" {
		err = errors.New("the pod has no address")
	} else {
		p.address = net.JoinHostPort(ip, "8080")
	}
	if err != nil {
		return nil, errors.Join(err, p.remove(ctx))
	}
	return p, nil
}

// remove stops and removes the pod, the containers before the sandbox, as the
// kubelet does.
func (p *pod) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTimeout)
	defer cancel()
	if _, err := p.n.rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return err
	}
	r, err := p.n.rt.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: p.id}})
	if err != nil {
		return err
	}
	for _, c := range r.Containers {
		if _, err := p.n.rt.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: c.Id}); err != nil {
			return err
		}
	}
	_, err = p.n.rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
	return err
}

func (p *pod) create(ctx context.Context, s service) (id string, err error) {
	r, err := p.n.rt.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.config, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "c"},
		Image:    &cri.ImageSpec{Image: reference(s.image)},
		Command:  s.command,
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}})
	return r.GetContainerId(), err
}

// timing is one measurement, in milliseconds from its beginning.
type timing struct {
	created, started, first float64
	requests                []request
	fill                    float64 // bytes a second; 0 where memory was full at the start
	container               string
	phases                  []event.Phase
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// start creates and starts the container of a pod that is there, and waits for
// the first right answer.
func (p *pod) start(ctx context.Context, s service, answers map[string]string) (t timing, err error) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	begin := time.Now()
	if t.container, err = p.create(ctx, s); err != nil {
		return t, err
	}
	t.created = ms(time.Since(begin))
	// The question is asked from the start of the container on, not only when
	// the CRI has answered.
	asking, stop := context.WithCancel(ctx)
	defer stop()
	answered := make(chan error, 1)
	var first time.Time
	go func() {
		var err error
		first, err = s.firstAnswer(asking, p.address, answers)
		answered <- err
	}()
	if _, err = p.n.rt.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: t.container}); err != nil {
		stop()
		<-answered
		return t, err
	}
	t.started = ms(time.Since(begin))
	if err = <-answered; err != nil {
		return t, err
	}
	t.first = ms(first.Sub(begin))
	return t, nil
}

// cold measures a start without a template.
func (n *node) cold(ctx context.Context, s service, set settings) (timing, error) {
	return n.whole(ctx, s, map[string]string{checkpoint.AnnotationPolicy: "template"}, nil, set)
}

// clone measures a start from the template.
func (n *node) clone(ctx context.Context, t *template, memory checkpoint.Memory, set settings) (timing, error) {
	return n.whole(ctx, t.service, map[string]string{checkpoint.AnnotationTemplate: t.name, checkpoint.AnnotationMemory: string(memory)}, t.answers, set)
}

// whole measures the way through the CRI.
func (n *node) whole(ctx context.Context, s service, annotations, answers map[string]string, set settings) (t timing, err error) {
	p, err := n.pod(ctx, s.short, annotations)
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, p.remove(ctx)) }()
	if t, err = p.start(ctx, s, answers); err != nil {
		return t, err
	}
	if answers != nil {
		if t.phases, err = p.restored(); err != nil {
			return t, err
		}
	}
	if set.Window > 0 {
		t.requests, t.fill, err = s.after(ctx, p.address, t.container, answers, set)
		if annotations[checkpoint.AnnotationMemory] == string(checkpoint.MemoryMapped) {
			t.fill = 0 // nothing is filled; what grows is what has been looked at
		}
	}
	return t, err
}

// restored returns the parts of the restore of the pod's container, which the
// event log must have as its latest.
func (p *pod) restored() ([]event.Phase, error) {
	last := event.Event{}
	err := eventlog.Read(storeRoot, func(e event.Event) {
		if e.Identity != nil && e.Identity.Key == p.config.Metadata.Uid {
			last = e
		}
	})
	mapped := p.config.Annotations[checkpoint.AnnotationMemory] == string(checkpoint.MemoryMapped)
	if err == nil && (last.Type != event.Restored || mapped != strings.Contains(last.Reason, "mapped from it")) {
		err = fmt.Errorf("not restored, or in another way: %s %s", last.Type, last.Reason)
	}
	return last.Phases, err
}

// template is a template with what its source answers.
type template struct {
	n       *node
	service service
	source  *pod
	name    string
	dir     string // of the version
	bytes   int64
	answers map[string]string // by path
	warm    latency           // of the source's requests
}

// template starts a service, warms it up, measures as many requests as the first
// seconds of all runs have, and makes a template of it. Then the source is gone: its
// memory would be in the way.
func (n *node) template(ctx context.Context, s service, set settings) (*template, error) {
	p, err := n.pod(ctx, s.short+"-source", map[string]string{checkpoint.AnnotationPolicy: "template"})
	if err != nil {
		return nil, err
	}
	defer p.remove(ctx)
	t := &template{n: n, service: s, name: s.short, answers: map[string]string{}}
	started, err := p.start(ctx, s, nil)
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	if err := s.warmUp(ctx, p.address, t.answers); err != nil {
		return nil, fmt.Errorf("warm-up: %w", err)
	}
	set.Window = time.Duration(set.Runs) * time.Second
	requests, _, err := s.after(ctx, p.address, started.container, t.answers, set)
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	var warm wayReport
	warm.add(timing{requests: requests})
	t.warm = warm.Window
	out, err := exec.CommandContext(ctx, "stasis", "template", "create", t.name, "-o", "json", "--pod", namespace+"/"+p.config.Metadata.Name).Output()
	if err != nil {
		if e := new(exec.ExitError); errors.As(err, &e) {
			err = fmt.Errorf("%w: %s", err, e.Stderr)
		}
		return nil, fmt.Errorf("template create: %w", err)
	}
	var made struct{ Version string }
	if err := json.Unmarshal(out, &made); err != nil {
		return nil, err
	}
	t.dir = filepath.Join(storeRoot, "templates", namespace, t.name, made.Version)
	return t, eachFile(t.dir, func(_ *os.File, size int64) error {
		t.bytes += size
		return nil
	})
}

func (t *template) remove(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "stasis", "template", "rm", namespace+"/"+t.name).CombinedOutput(); err != nil {
		progress("template rm: %v: %s", err, out)
	}
}

// atOnce starts so many clones at a time, and measures their memory when it no
// longer grows, and once more when equal pages have been merged.
func (n *node) atOnce(ctx context.Context, t *template, way string, count int, merge bool) (r atOnceReport, err error) {
	r.Clones, r.Way = count, way
	// A clone that shares nothing needs what the template holds; one that shares what
	// it does not write to needs a part of that, a third at the most in what was seen.
	need, free := int64(count)*t.bytes, meminfo("MemAvailable")
	if way == wayMapped {
		need = t.bytes + need/3
	}
	if need > free*8/10 {
		r.Skipped = fmt.Sprintf("%d MB might be needed, %d MB are free", need>>20, free>>20)
		return r, nil
	}
	pods := make([]*pod, 0, count)
	defer func() {
		for _, p := range pods {
			err = errors.Join(err, p.remove(ctx))
		}
	}()
	for range count {
		p, err := n.pod(ctx, t.service.short, map[string]string{
			checkpoint.AnnotationTemplate: t.name, checkpoint.AnnotationMemory: string(memories[way]), checkpoint.AnnotationMerge: strconv.FormatBool(merge)})
		if err != nil {
			return r, err
		}
		pods = append(pods, p)
	}
	timings, errs := make([]timing, count), make([]error, count)
	begin := time.Now()
	var wg sync.WaitGroup
	for i, p := range pods {
		wg.Go(func() { timings[i], errs[i] = p.start(ctx, t.service, t.answers) })
	}
	wg.Wait()
	r.TotalMs = ms(time.Since(begin))
	if err := errors.Join(errs...); err != nil {
		return r, err
	}
	ids := []string{}
	for i, p := range pods {
		if _, err := p.restored(); err != nil {
			return r, err
		}
		r.EachMs = append(r.EachMs, timings[i].first)
		ids = append(ids, timings[i].container)
	}
	if r.PSSBytes, err = settledPSS(ctx, ids); err == nil && merge {
		err = merged(ctx, ids, &r)
	}
	return r, err
}

// coldCopies measures the memory of copies that were started cold and warmed
// up, of as many as fit beside each other.
func (n *node) coldCopies(ctx context.Context, t *template, r *serviceReport) (err error) {
	most := 0
	for _, a := range r.AtOnce {
		if a.Skipped == "" {
			most = max(most, a.Clones)
		}
	}
	if most == 0 {
		return nil
	}
	fit := int(meminfo("MemAvailable") * 6 / 10 / max(t.bytes, 1))
	measured := max(1, min(most, fit, 4)) // what four share, more share too
	progress("%s: %d cold copies", t.service.name, measured)
	ids := []string{}
	for range measured {
		p, err := n.pod(ctx, t.service.short+"-cold", map[string]string{checkpoint.AnnotationPolicy: "template"})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, p.remove(ctx)) }()
		x, err := p.start(ctx, t.service, nil)
		if err != nil {
			return err
		}
		if err := t.service.warmUp(ctx, p.address, map[string]string{}); err != nil {
			return err
		}
		ids = append(ids, x.container)
	}
	pss, err := settledPSS(ctx, ids)
	if err != nil {
		return err
	}
	for i, a := range r.AtOnce {
		if a.Skipped == "" {
			r.AtOnce[i].ColdPSSBytes = pss * int64(a.Clones) / int64(measured)
			r.AtOnce[i].ColdMeasured = measured
		}
	}
	return nil
}

// settledPSS is the proportional memory of the containers' processes, when it
// grows no longer.
func settledPSS(ctx context.Context, ids []string) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	var last int64
	for {
		m, err := memoryOf(ids)
		if err != nil {
			return 0, err
		}
		pss := m.pss
		if pss-last < max(last/100, 1<<20) {
			return pss, nil
		}
		last = pss
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("memory still grows, %d MB: %w", pss>>20, ctx.Err())
		case <-time.After(2 * time.Second):
		}
	}
}

// memory is that of some containers, in bytes.
type memory struct {
	pss int64 // a page that N processes have counts for an Nth of it
	ksm int64 // pages that are merged, all of each
}

func memoryOf(ids []string) (total memory, err error) {
	found := 0
	names, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil || !containsAny(string(b), ids) {
			continue
		}
		b, err = os.ReadFile(filepath.Join(filepath.Dir(name), "smaps_rollup"))
		if err != nil {
			return total, fmt.Errorf("memory of a clone: %w", err)
		}
		found++
		total.pss += kilobytes(string(b), "Pss")
		total.ksm += kilobytes(string(b), "KSM")
	}
	if found < len(ids) {
		return total, fmt.Errorf("%d containers have %d processes", len(ids), found)
	}
	return total, nil
}

func containsAny(text string, words []string) bool {
	for _, w := range words {
		if strings.Contains(text, w) {
			return true
		}
	}
	return false
}
