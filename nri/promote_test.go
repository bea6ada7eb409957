package nri

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// promotions is a promoter with a clock of its own; what it asks is answered by
// answer, and noted with the time since the test began.
type promotions struct {
	*promoter
	t      *testing.T
	answer func(id string) (control.Promotion, error)
	begin  time.Time
	asked  []string // "id@seconds"
	jobLog
}

func promoting(t *testing.T, test func(p *promotions)) {
	synctest.Test(t, func(t *testing.T) {
		p := &promotions{t: t, begin: time.Now(), answer: func(string) (control.Promotion, error) { return control.Promotion{}, nil }}
		p.promoter = newPromoter(p.add, func(_ context.Context, id string) (control.Promotion, error) {
			p.asked = append(p.asked, fmt.Sprintf("%s@%.0f", id, time.Since(p.begin).Seconds()))
			return p.answer(id)
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); p.run(ctx) }()
		test(p)
		cancel()
		<-done
	})
}

func (p *promotions) start(id string, annotations map[string]string) {
	p.started(promotable(annotations), &api.Container{Id: id, Name: "c", PodSandboxId: "sandbox"})
}

func promotable(annotations map[string]string) *api.PodSandbox {
	if annotations == nil {
		annotations = map[string]string{checkpoint.AnnotationTemplate: "shop", checkpoint.AnnotationPromoteAfter: "30s"}
	}
	return testPod(annotations)
}

func (p *promotions) want(after time.Duration, asked ...string) {
	p.t.Helper()
	time.Sleep(after)
	synctest.Wait()
	if got := strings.Join(p.asked, " "); got != strings.Join(asked, " ") {
		p.t.Errorf("asked %q, want %q", got, asked)
	}
}

func TestPromoteAfter(t *testing.T) {
	promoting(t, func(p *promotions) {
		p.start("a", nil)
		p.start("none", map[string]string{checkpoint.AnnotationTemplate: "shop"})
		p.start("bad", map[string]string{checkpoint.AnnotationTemplate: "shop", checkpoint.AnnotationPromoteAfter: "soon"})
		p.want(29 * time.Second)
		p.start("gone", nil)
		p.start("b", nil) // before whom another one is due
		p.start("soon", map[string]string{checkpoint.AnnotationTemplate: "bank", checkpoint.AnnotationPromoteAfter: "5s"})
		p.want(time.Second, "a@30")
		p.forget("gone")
		p.want(24*time.Hour, "a@30", "soon@34", "b@59")
		if es := p.events(); len(es) != 0 {
			t.Errorf("events %+v", es)
		}
	})
}

// TestPromoteFails: a container is tried several times, each time after a longer
// pause, and each failure is told; others of the template take turns with it.
func TestPromoteFails(t *testing.T) {
	promoting(t, func(p *promotions) {
		p.answer = func(id string) (control.Promotion, error) {
			return control.Promotion{}, fmt.Errorf("no: %w", checkpoint.ErrNoSpace)
		}
		p.start("a", nil)
		p.want(24*time.Hour, "a@30", "a@60", "a@120", "a@240")
		es := p.events()
		if len(es) != promoteAttempts {
			t.Fatalf("%d events: %+v", len(es), es)
		}
		for i, e := range es {
			if e.Type != event.PromoteFail || e.ReasonCode != "no-space" || e.ContainerID != "a" || e.Identity.Key != "uid-1" || e.PodUID != "uid-1" ||
				!strings.Contains(e.Reason, fmt.Sprintf("template shop, attempt %d of 4, ", i+1)) {
				t.Errorf("event %d: %+v", i, e)
			}
		}
		if got := es[3].Reason; !strings.Contains(got, "given up") {
			t.Errorf("the last one: %s", got)
		}
	})
	promoting(t, func(p *promotions) {
		p.answer = func(id string) (control.Promotion, error) {
			if id == "a" {
				return control.Promotion{}, errors.New(strings.Repeat("x", 1<<16))
			}
			return control.Promotion{Result: control.Result{CheckpointID: recordID}}, nil
		}
		p.start("a", nil)
		time.Sleep(time.Second)
		p.start("b", nil)
		p.start("other", map[string]string{checkpoint.AnnotationTemplate: "bank", checkpoint.AnnotationPromoteAfter: "30s"})
		// Another template does not rest. Once b is one there is no pause any more.
		p.want(time.Hour, "a@30", "other@31", "b@60", "a@60", "a@90", "a@150")
		if es := p.events(); len(es[0].Reason) > 2*maxReason {
			t.Errorf("a reason of %d bytes", len(es[0].Reason))
		}
	})
	promoting(t, func(p *promotions) {
		p.answer = func(string) (control.Promotion, error) { return control.Promotion{}, errors.New("no") }
		for i := range 50 { // as a container in a crash loop
			p.start(fmt.Sprint(i), nil)
			time.Sleep(time.Minute)
		}
		time.Sleep(10 * time.Minute)
		if n := len(p.asked); n > 8 {
			t.Errorf("asked %d times in an hour", n)
		}
		time.Sleep(100 * time.Hour)
		p.promoter.mu.Lock()
		if len(p.candidates) != 0 || len(p.resting) != 0 {
			t.Errorf("left: %d candidates, %d templates", len(p.candidates), len(p.resting))
		}
		p.promoter.mu.Unlock()
	})
}

// TestPromoteAfterRestart: a new daemon learns from the runtime who runs, and
// since when.
func TestPromoteAfterRestart(t *testing.T) {
	promoting(t, func(p *promotions) {
		since := func(id string, d time.Duration, state api.ContainerState) *api.Container {
			return &api.Container{Id: id, Name: "c", PodSandboxId: "sandbox", State: state, StartedAt: time.Now().Add(-d).UnixNano()}
		}
		const running, stopped = api.ContainerState_CONTAINER_RUNNING, api.ContainerState_CONTAINER_STOPPED
		list := []*api.Container{since("old", time.Hour, running), since("new", 20*time.Second, running), since("exited", time.Hour, stopped),
			since("future", -time.Hour, running), since("stranger", time.Hour, running)}
		list[4].PodSandboxId = "unknown"
		p.start("gone", nil)
		p.replace([]*api.PodSandbox{promotable(nil)}, list)
		p.want(time.Hour, "old@0", "new@10", "future@30")
		// The same list again, after a restart of the runtime.
		p.replace([]*api.PodSandbox{promotable(nil)}, list[:1])
		p.want(time.Hour, "old@0", "new@10", "future@30", "old@3600")
	})
}
